"""Whole weights from any layout: gathered one tensor at a time to rank 0, which streams them into a folder.

    export_hf(model, "out", tokenizer="Qwen3-0.6B", dtype=torch.bfloat16)      # every rank calls it
    weights = to_hf_state_dict(model)                                          # in memory, on rank 0

Beside its own part of the model, rank 0 holds one whole tensor, the others nothing.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from shared.experiment.contracts import AssayError
from shared.experiment.files import Unwritable, sync_folder
from shared.megatron.config import ModelConfig
from shared.megatron.hf_config import config_text, hf_config
from shared.megatron.hf_files import DTYPES, ShardWriter, write_synced
from shared.megatron.hf_names import Held, held, whole_tensors
from shared.megatron.hf_tokenizer import Vocabulary, carry
from shared.megatron.init import current_layout
from shared.megatron.model import config_of

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


class ExportNotWritten(Unwritable):
    """An export that could not be finished; nothing that looks like a model was left."""


def export_hf(
    model: GPTModel | Sequence[GPTModel],
    path: str | Path,
    *,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int = 5 * 10**9,
) -> None:
    """Write the whole model into the new folder `path`; every rank calls it with its chunks, rank 0 writes.

    tokenizer: folder whose tokenizer files, chat template and generation_config.json are copied byte for byte; the ids
        of its special tokens go into config.json. dtype: None keeps that of the parameters. max_shard_size: bytes.
    The folder appears whole and flushed to the disk, or not at all.

    Raises `UnsupportedArchitecture`, `TokenizerDoesNotFit` or `ExportNotWritten` on all ranks.
    """
    chunks = [model] if isinstance(model, torch.nn.Module) else list(model)
    config = config_of(chunks[0])
    dtype = dtype or next(chunks[0].parameters()).dtype
    source = None if tokenizer is None else Path(tokenizer)
    pieces = held(chunks, config)
    export = _Export(config, Path(path), source, dtype, max_shard_size) if dist.get_rank() == 0 else None
    _on_rank_0(export.start if export else None)
    for name, tensor in _gathered(pieces, config, dtype):
        if export:
            export.add(name, tensor)
    _on_rank_0(export.finish if export else None)


def to_hf_state_dict(model: GPTModel) -> dict[str, torch.Tensor]:
    """Copies of all weights under Hugging Face names; as in Hugging Face files, a tied head has no entry.

    Under a layout all ranks call it, and rank 0 gets the weights; the others get an empty dict.
    """
    config, dtype = config_of(model), next(model.parameters()).dtype
    return {name: tensor.clone() for name, tensor in _gathered(held([model], config), config, dtype)}


class _Export:
    """A folder that is written beside its final place and renamed when it is whole. Of rank 0."""

    def __init__(
        self, config: ModelConfig, path: Path, tokenizer: Path | None, dtype: torch.dtype, max_shard_size: int
    ):
        self.config, self.path, self.tokenizer, self.dtype = config, path.absolute(), tokenizer, dtype
        self.partial = self.path.with_name(f".{path.name}.partial")
        shapes = [(tensor.name, tensor.shape) for tensor in whole_tensors(config)]
        self.writer = ShardWriter(self.partial, shapes, dtype, max_shard_size)
        self.error: OSError | None = None
        self.lock = -1

    def start(self) -> None:
        if self.dtype not in DTYPES.values():
            raise ExportNotWritten(f"cannot export {self.dtype}: choose float32, bfloat16 or float16 with dtype=")
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise ExportNotWritten(f"{self.path} exists: choose another folder, or move it away")
        vocabulary = None if self.tokenizer is None else Vocabulary(self.tokenizer)
        ids = {} if vocabulary is None else vocabulary.special_ids()
        if vocabulary:
            vocabulary.check(self.config.vocab_size)
        text = config_text(hf_config(self.config, dtype=str(self.dtype).removeprefix("torch."), **ids))
        self._own_folder()
        try:
            free = shutil.disk_usage(self.partial).free
            if free < self.writer.total:
                raise ExportNotWritten(
                    f"{self.path} needs {self.writer.total} bytes and {free} are free: free space or choose another "
                    "disk"
                )
            write_synced(self.partial / "config.json", text.encode())
            if self.tokenizer:
                carry(self.tokenizer, self.partial)
        except BaseException:
            self._remove()
            raise

    def _own_folder(self) -> None:
        self.partial.mkdir(parents=True, exist_ok=True)
        # The lock is on the folder itself, so that it goes along with the rename and with the process.
        self.lock = os.open(self.partial, os.O_RDONLY)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self.lock)
            raise ExportNotWritten(f"another process is exporting to {self.path}: wait, or choose another") from None
        for leftover in self.partial.iterdir():
            leftover.unlink()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor; after an error the rest is let pass, because other ranks are still sending."""
        if self.error is None:
            try:
                self.writer.add(name, tensor)
            except OSError as error:
                self.error = error

    def finish(self) -> None:
        try:
            if self.error is not None:
                raise self.error
            self.writer.finish()
            sync_folder(self.partial)
            self.partial.rename(self.path)
            sync_folder(self.path.parent)
        except OSError:
            self.writer.close()
            self._remove()
            raise
        os.close(self.lock)

    def _remove(self) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)
        os.close(self.lock)


def _on_rank_0(action: Callable[[], None] | None) -> None:
    """Run rank 0's `action`, and raise on all ranks what it raised."""
    outcome: list[AssayError | None] = [None]
    if action:
        try:
            action()
        except AssayError as error:
            outcome = [error]
        except OSError as error:
            outcome = [ExportNotWritten(f"Cannot write the export ({error}): free space or choose another folder")]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise outcome[0]


@torch.no_grad()
def _gathered(pieces: Sequence[Held], config: ModelConfig, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """On rank 0 every tensor whole, on the CPU, valid until the next one; other ranks get none, and send."""
    own: dict[str, Held] = {}
    for piece in pieces:
        own.setdefault(piece.tensor.name, piece)
    senders = _senders(own, config)
    rank = dist.get_rank()
    room = _Room(dtype)
    for tensor in whole_tensors(config):
        ranks = senders[tensor.name]
        if rank and rank in ranks:
            dist.send(_flat(own[tensor.name], dtype), dst=0)
        elif not rank and ranks == [0]:
            yield tensor.name, _flat(own[tensor.name], dtype)
        elif not rank:
            whole = room.take("whole", tensor.shape)
            for part, sender in enumerate(ranks):
                region = whole[tensor.region(part, len(ranks))]
                if sender == 0:
                    region.copy_(own[tensor.name].view.reshape(region.shape))
                elif region.is_contiguous():
                    dist.recv(region, src=sender)
                else:
                    received = room.take("part", region.shape)
                    dist.recv(received, src=sender)
                    region.copy_(received)
            yield tensor.name, whole


class _Room:
    """Memory that is used again: a freed tensor between two that live on would be lost to the allocator."""

    def __init__(self, dtype: torch.dtype):
        self._dtype = dtype
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        size = torch.Size(shape).numel()
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers.pop(name, None)
            self._buffers[name] = torch.empty(size, dtype=self._dtype)
        return self._buffers[name][:size].view(tuple(shape))


def _senders(own: dict[str, Held], config: ModelConfig) -> dict[str, list[int]]:
    """Name of a tensor -> for each of its parts, the first rank that holds it."""
    tensors = whole_tensors(config)
    offer = [(index, own[tensor.name].part) for index, tensor in enumerate(tensors) if tensor.name in own]
    offers = [offer]
    if dist.get_world_size() > 1:
        offers = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(offers, offer)
    first: dict[tuple[int, int], int] = {}
    for rank, pairs in enumerate(offers):
        for pair in pairs:
            first.setdefault(pair, rank)
    sizes = [1 if tensor.split is None else current_layout().tp for tensor in tensors]
    return {tensor.name: [first[index, part] for part in range(sizes[index])] for index, tensor in enumerate(tensors)}


def _flat(piece: Held, dtype: torch.dtype) -> torch.Tensor:
    """The region as a contiguous tensor on the CPU; the parameter's own memory where that is one already."""
    return piece.view.detach().to("cpu", dtype).reshape(piece.shape).contiguous()
