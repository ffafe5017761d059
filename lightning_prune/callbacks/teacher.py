"""The dense network that the slim one learns from: its weights, the file they are kept in, and what it says."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_prune.callbacks.ranks import agreed, run_together
from lightning_prune.callbacks.restart import read_weights, saved_tensors
from lightning_prune.errors import ConfigurationError
from lightning_prune.structure.drafts import draft_of
from lightning_prune.structure.plan import named_tensors, submodule
from lightning_prune.structure.replica import replica, to_device, uncompiled
from lightning_prune.structure.weight_file import digest_of, pack, unpack

FILE = "teacher.safetensors"


class Teacher:
    """The network as it was when the sparse stage began, or as a file has it; frozen, in evaluation mode.

    Until surgery it is no more than weights on the CPU, rank 0's on every rank. They are written once beside the
    checkpoints, and a checkpoint remembers the digest of that file: a resumed run takes no other one for it. No module
    registers the network, so no optimiser, checkpoint, average or bucket of DDP knows of it.

    Args:
        path: of a file with the dense network's weights; ``None`` takes them from the network in training.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.path = None if path is None else os.fspath(path)
        self.record: dict[str, Any] | None = None
        self.network: nn.Module | None = None
        self.given: str | None = None  # digest of what was read from the path
        self._weights: dict[str, Tensor] | None = None
        self._given: dict[str, Tensor] = {}
        self._dense: nn.Module | None = None
        self._unknown: list[str] = []
        self._awake = set[str]()

    @property
    def source(self) -> str:
        """Where its weights come from, in words."""
        return "" if self.record is None else str(self.record["source"])

    def restore(self, record: Mapping[str, Any] | None, given: str | None = None) -> None:
        """Take over what a checkpoint remembers."""
        self.given = given
        known = None if record is None else {name: record[name] for name in ("file", "folder", "digest", "source")}
        if known is None or self.record is None or known["digest"] != self.record["digest"]:
            self._weights = self.network = None
        self.record = known

    def keep_dense(self, pl_module: LightningModule) -> None:
        """A checkpoint of the slim network is about to cut this module: remember how it is built."""
        self._dense = _copy_of(pl_module, "cpu")

    def meet(self, trainer: Trainer, pl_module: LightningModule, is_dense: bool) -> None:
        """Before the first step: read what there is to read. Every rank has to call it.

        Args:
            trainer: about to begin, or to go on.
            pl_module: in training.
            is_dense: whether no sparse stage has begun.

        Raises:
            ConfigurationError: a file is missing or does not fit, or nothing tells what the dense network was.
        """
        if self._weights is not None or self.network is not None:
            return
        _refuse_unfit(pl_module)
        if self.record is not None:
            self._recall(trainer, pl_module)
        elif self.path is not None:
            self._given = self._read(trainer, pl_module)
            before, self.given = self.given, digest_of(pack(self._given))
            if before not in (None, self.given):
                rank_zero_warn(
                    f"teacher={self.path!r} holds other weights than when the run began; it takes the new ones."
                )
            if not is_dense:
                self._adopt(trainer, self._given, str(self.path))
        elif not is_dense:
            raise ConfigurationError(
                "The checkpoint knows no teacher, and its network isn't dense any more: give teacher=PATH, or resume"
                " from before the sparse stage."
            )

    def take(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Now, as the first sparse stage begins, unless that is done. Every rank has to call it."""
        if self.record is None:
            source = f"the dense network as of epoch {trainer.current_epoch}" if self.path is None else self.path
            own = run_together(trainer, lambda: _weights(pl_module), "The teacher")
            self._adopt(trainer, {**own, **self._given}, source)
            self._given = {}

    def build(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Become a network: right before surgery, or after a resume behind it."""
        if self.network is not None or self._weights is None:
            return
        self.network = run_together(trainer, lambda: self._built(trainer, pl_module), "The teacher")
        self._weights = self._dense = None

    @torch.no_grad()
    def ask(
        self, root: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], pl_module: LightningModule
    ) -> list[Any]:
        """What one of its modules puts out whenever it is called, in a call of a module around it.

        Before surgery a copy of the student answers for it, so that what can't work is known in time.

        Args:
            root: name of the called module, ``""`` for the LightningModule.
            name: of the module whose outputs are wanted.
            args: as the student's is called; left as they are.
            kwargs: the same.
            pl_module: the student.

        Raises:
            ConfigurationError: it can't be called so, or nothing is known of a part of it.
        """
        if self.network is None:
            with isolate_rng():
                return _outputs(_frozen(uncompiled(_copy_of(pl_module))), root, name, args, kwargs)
        if root not in self._awake:
            lost = [each for each in self._unknown if each.startswith(f"{root}." if root else "")]
            if lost:
                raise ConfigurationError(f"teacher={self.path!r} lacks {lost[0]!r}, which {root or 'forward'} has.")
            submodule(self.network, root).to(pl_module.device)
            self._awake.add(root)
        return _outputs(self.network, root, name, args, kwargs)

    def sleep(self) -> None:
        """Go back to the CPU."""
        self._awake.clear()
        if self.network is not None:
            self.network.cpu()

    def _built(self, trainer: Trainer, pl_module: LightningModule) -> nn.Module:
        network = uncompiled(_copy_of(pl_module, "cpu") if self._dense is None else self._dense)
        trainer.precision_plugin.convert_module(network)
        saved, weights = saved_tensors(network), self._weights or {}
        own, buffers = {**named_tensors(network), **saved}, dict(network.named_buffers(remove_duplicate=False))
        for name, value in weights.items():
            held = own.get(name)
            if held is not None and held.shape == value.shape:
                held.detach().copy_(value)
            elif held is not None and name in buffers:  # a record has another length by now
                path, _, key = name.rpartition(".")
                network.get_submodule(path)._buffers[key] = value.to(held)
            else:
                found = "nothing of that name" if held is None else f"shape {tuple(held.shape)}"
                raise ConfigurationError(
                    f"The teacher does not fit this module: {name!r} has shape {tuple(value.shape)} there, and here"
                    f" is {found}; resume with a fresh dense module of the class it was trained with."
                )
        self._unknown = [name for name in saved if name not in weights]
        return _frozen(network)

    def _read(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor]:
        network = pl_module if self._dense is None else self._dense

        def read() -> dict[str, Tensor]:
            return read_weights(str(self.path), network, "teacher") if trainer.is_global_zero else {}

        return agreed(trainer, read, "The teacher")

    # The file.

    def _adopt(self, trainer: Trainer, weights: dict[str, Tensor], source: str) -> None:
        """Rank 0's weights on all ranks, and in a file."""
        self._weights = agreed(trainer, lambda: weights, "The teacher")
        folder = _folder(trainer)

        def keep() -> dict[str, Any]:
            return self._kept(trainer, folder, pack(self._weights or {}), source) if trainer.is_global_zero else {}

        self.record = agreed(trainer, keep, "The teacher")

    def _kept(self, trainer: Trainer, folder: str, data: bytes, source: str) -> dict[str, Any]:
        digest, name = digest_of(data), None
        try:
            if not trainer.fast_dev_run:  # type: ignore[attr-defined]  # Lightning sets it from afar
                name = _write(folder, data, digest)
        except Exception as error:  # a full disk, a folder that can't be written
            rank_zero_warn(
                f"The teacher can't be written to {folder} ({type(error).__name__}: {error}); training goes on, but a"
                " resumed run will need teacher=PATH."
            )
        return {"file": name, "folder": folder, "digest": digest, "source": source}

    def _recall(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = _folder(trainer)

        def find() -> tuple[dict[str, Tensor], dict[str, Any]] | None:
            if not trainer.is_global_zero or self.record is None:
                return None
            before = "" if trainer.ckpt_path is None else os.path.dirname(str(trainer.ckpt_path))
            data = _found(self.record, [before, str(self.record["folder"]), folder])
            return None if data is None else (unpack(data), self._kept(trainer, folder, data, self.source))

        found = agreed(trainer, find, "The teacher")
        if found is not None:
            self._weights, self.record = found
            if self.path not in (None, self.source):
                rank_zero_warn(f"The run goes on with the teacher that it began with, {self.source}; not {self.path}.")
        elif self.path is not None:
            self._adopt(trainer, self._read(trainer, pl_module), self.path)
        else:
            known = self.record or {}
            raise ConfigurationError(
                f"The teacher of this run, {known.get('file') or FILE!r} with SHA-256 {str(known.get('digest'))[:12]},"
                f" lies neither beside the checkpoint nor in {known.get('folder')}; put it there, or give teacher=PATH."
            )


def _weights(pl_module: LightningModule) -> dict[str, Tensor]:
    """Copies on the CPU of all that it computes with, saved or not."""
    own = {**named_tensors(pl_module), **saved_tensors(pl_module)}
    return {name: value.detach().to("cpu", copy=True) for name, value in own.items()}


def _refuse_unfit(pl_module: LightningModule) -> None:
    for name, tensor in named_tensors(pl_module).items():
        if is_lazy(tensor):
            raise ConfigurationError(
                f"distill needs to know the network, and {name!r} has no shape yet; call it once before fit."
            )
        try:
            pack({name: tensor.new_empty(0) if tensor.layout == torch.strided else tensor})
        except Exception as error:
            raise ConfigurationError(
                f"distill keeps the teacher in a safetensors file, which can't hold {name!r} ({tensor.dtype},"
                f" {tensor.layout}); keep it as dense numbers, or as no parameter or buffer."
            ) from error


def _copy_of(pl_module: LightningModule, device: str | None = None) -> nn.Module:
    try:
        return replica(pl_module, device)
    except Exception as error:
        first = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
        raise ConfigurationError(
            f"The teacher is a copy of the LightningModule, and {type(pl_module).__name__} can't be copied ({first});"
            " keep what stands in the way elsewhere."
        ) from error


def _frozen(network: nn.Module) -> nn.Module:
    """It learns nothing, drops nothing, and has nothing to say but its logits."""
    for module in network.modules():
        if isinstance(module, LightningModule):
            vars(module).update(log=_nothing, log_dict=_nothing)
    return network.requires_grad_(False).eval()


def _outputs(network: nn.Module, root: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    found = list[Any]()
    handle = submodule(network, name).register_forward_hook(lambda *call: found.append(call[2]))
    try:
        submodule(network, root)(*to_device(args, None), **to_device(kwargs, None))
    except Exception as error:
        first = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
        raise ConfigurationError(
            f"The teacher can't run in evaluation mode on what {root or 'the LightningModule'} is called with"
            f" ({first}); name the whole network with logits_from=...."
        ) from error
    finally:
        handle.remove()
    return found


def _folder(trainer: Trainer) -> str:
    """Where checkpoints go, or else what belongs to the run; asks all ranks."""
    folder = trainer.log_dir or trainer.default_root_dir
    keepers: list[Any] = [*trainer.checkpoint_callbacks]
    keeper = next((each for each in keepers if isinstance(each, ModelCheckpoint)), trainer.checkpoint_callback)
    folder = str(getattr(keeper, "dirpath", None) or folder)
    return folder if "://" in folder else os.path.abspath(folder)


def _write(folder: str, data: bytes, digest: str) -> str:
    """Writes a file and gives its name; a file of the same content serves as well, any other one stays."""
    system = get_filesystem(folder)
    system.makedirs(folder, exist_ok=True)
    stem, suffix = os.path.splitext(FILE)
    paths = (os.path.join(folder, f"{stem}-{number}{suffix}" if number else FILE) for number in count())
    path = next(each for each in paths if not system.exists(each) or _is_it(each, digest))
    if system.exists(path):
        pass  # it is there already
    elif "://" in folder:
        system.pipe_file(path, data)
    else:
        with draft_of(path) as draft:
            draft.write_bytes(data)
    return os.path.basename(path)


def _found(record: Mapping[str, Any], folders: Sequence[str]) -> bytes | None:
    """The file's content, from the first folder that has it."""
    for folder in dict.fromkeys(folders) if record["file"] else ():
        path = os.path.join(folder, str(record["file"]))
        if _is_it(path, str(record["digest"])):
            data: bytes = get_filesystem(path).cat_file(path)
            return data
    return None


def _is_it(path: str, digest: str) -> bool:
    try:
        return digest_of(get_filesystem(path).cat_file(path)) == digest
    except OSError:
        return False


def _nothing(*_: Any, **__: Any) -> None:
    pass
