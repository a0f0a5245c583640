"""Megatron's torch_dist format: which part of a sharded state this rank writes, and reading it back into any layout.

Megatron's planning and its reader are used as they are; `shared.training.distributed_checkpoint` says why its writer
is not.
"""

from __future__ import annotations

import contextlib
import io
import os
import queue
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import SerializationFormat, _write_item

from shared.megatron.init import quiet_imports
from shared.training.manifest import CheckpointMismatch, file_entry

with quiet_imports():
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException, save_config
    from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

Written = list[Any]
"""torch's `WriteResult`s of one rank: where in which file each shard lies."""


class Share:
    """What one rank has to write of a checkpoint, in host memory once `plan_share` returned it."""

    def __init__(self, writer: Any, metadata: Any, common: bytes | None, snapshot: bool) -> None:
        self.folder = Path(writer.checkpoint_dir)
        self._writer = writer
        self._metadata = metadata
        self._common = common
        self._files = [
            (name, [*objects, *((item, _to_host(tensor, snapshot)) for item, tensor in tensors)])
            for _, name, (objects, tensors) in writer.write_buckets
        ]

    def write(self) -> tuple[Written, dict[str, dict[str, Any]]]:
        """Write and sync this rank's files; returns what is where, and their manifest entries."""
        written: Written = []
        for name, items in self._files:
            with open(self.folder / name, "wb") as file:
                for item, data in items:
                    written.append(
                        _write_item(self._writer.transforms, file, data, item, name, SerializationFormat.TORCH_SAVE)
                    )
                _sync(file)
        names = [name for name, _ in self._files]
        if self._common is not None:
            with open(self.folder / COMMON_STATE_FNAME, "wb") as file:
                file.write(self._common)
                _sync(file)
            names.append(COMMON_STATE_FNAME)
        self._files = []
        return written, {name: file_entry(self.folder / name) for name in names}

    def write_metadata(self, written: Sequence[Written]) -> dict[str, dict[str, Any]]:
        """On rank 0, once every rank has written: the index of all shards. Returns the manifest entries."""
        self._writer.finish(self._metadata, list(written))
        save_config(CheckpointingConfig("torch_dist"), str(self.folder))
        return {name: file_entry(self.folder / name) for name in (".metadata", "metadata.json")}


def plan_share(state: dict[str, Any], folder: Path, snapshot: bool) -> Share:
    """Decide together with the other ranks who writes what of a sharded state dict (which is used up).

    Replicas are spread over the data-parallel ranks. With `snapshot` the share is a copy that later training steps do
    not touch; without, it must be written before the next step.
    """
    # Else a Manager process would be started that passes results between processes.
    filesystem_async._results_queue = queue.SimpleQueue()
    with _quiet():
        return _plan(state, folder, snapshot)


def load_tensors(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Fill a sharded state dict from a checkpoint whose files were verified. Raises `CheckpointMismatch`."""
    try:
        with _quiet():
            return cast(dict[str, Any], dist_checkpointing.load(state, str(folder)))
    except (CheckpointingException, CheckpointException, KeyError) as error:
        why = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        raise CheckpointMismatch(f"{folder} does not hold what this model and optimizer need ({why}).") from error


def _plan(state: dict[str, Any], folder: Path, snapshot: bool) -> Share:
    sharded, common = save_preprocess(state)
    strategy: Any = _PlanOnly("torch_dist", 1, thread_count=1)
    if dist.get_world_size() > 1:
        replicas: Any = parallel_state.get_data_parallel_group(with_context_parallel=True)
        strategy = FullyParallelSaveStrategyWrapper(strategy, replicas)
    writer, metadata = strategy.async_save(sharded, folder)
    packed = None
    if dist.get_rank() == 0:
        buffer = io.BytesIO()
        torch.save(common, buffer)
        packed = buffer.getvalue()
    return Share(writer, metadata, packed, snapshot)


class _PlanOnly(TorchDistSaveShardedStrategy):
    """Megatron's planning, stopped before it makes a request out of the plan."""

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any) -> Any:
        return writer, save_state_dict_ret[1]


def _to_host(tensor: torch.Tensor, snapshot: bool) -> torch.Tensor:
    if tensor.device.type != "cpu":
        return tensor.to("cpu")
    return tensor.clone() if snapshot else tensor


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Megatron calls parts of torch that are to be replaced one day."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(DTensor|load_state_dict)", category=FutureWarning)
        yield
