"""The command line: ``lightning-prune`` or ``python -m lightning_prune``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lightning_prune.cli.arguments import parser_of
from lightning_prune.errors import PruningError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: as on the command line, without the program's name; ``None`` takes the command line's own.

    Returns:
        0 for success (``plan diff``: the plans agree), 1 where the library refuses (``plan diff``: they differ), 2 for
        wrong usage.
    """
    parser, words = parser_of(), sys.argv[1:] if arguments is None else list(arguments)
    if words[:1] == ["plan"] and words[1:2] in (["diff"], ["apply"]):
        words[:2] = [" ".join(words[:2])]  # beside a nested parser no argument could be left for LightningCLI
    asked, rest = parser.parse_known_args(words)
    if rest and (not asked.takes_rest or asked.model is not None):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        status: int = asked.run(asked, rest)
    except (PruningError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        sys.stderr.write(f"lightning-prune: error: {error}\n")
        return 2 if isinstance(error, OSError) else 1
    except BrokenPipeError:  # the reader of our output has gone, as head does
        sys.stderr.close()
        return 0
    return status
