"""What can go wrong, each with one sentence for the person who has to mend it."""

from __future__ import annotations


class PruningError(Exception):
    """Base of every error that this library raises on purpose."""


class ConfigurationError(PruningError, ValueError):
    """An argument, or a combination of arguments, that can't be meant."""


class UnknownLayerError(PruningError, KeyError):
    """A name that nothing in the model has."""

    def __str__(self) -> str:
        return Exception.__str__(self)  # a KeyError would put its message in quotes


class TraceError(PruningError, RuntimeError):
    """The model's forward pass could not be watched."""


class PlanError(PruningError, ValueError):
    """A pruning plan that is malformed or belongs to another model."""


class ProofError(PruningError, RuntimeError):
    """The slim network does not compute what the masked dense network computes."""


class SlimFileError(PruningError, ValueError):
    """A slim file that is damaged, foreign, or belongs to another model."""


class ExportError(PruningError, RuntimeError):
    """A model that can't be written in another format, or a file that computes something else."""
