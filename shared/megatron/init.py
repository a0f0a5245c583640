"""Process groups for one process, and Megatron's imports without their noise.

    device = initialize()          # the first GPU, else the CPU; calling it again is free

A dense single process needs no patched torch: while it runs without dropout, the one place in Megatron that asks CUDA
for a device is the rotary table, which `shared.megatron.spec` replaces.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist


def initialize(device: torch.device | str | None = None) -> torch.device:
    """Set up process groups of world size 1 and return the device to build models on.

    `device` defaults to the first GPU when there is one, else the CPU. Groups that exist already are kept, whoever
    made them. The store lives inside the process, so no port is opened and parallel processes cannot collide.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with quiet_imports():
        from megatron.core import parallel_state
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        hook = sys.excepthook
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        # torch.distributed installs a hook that prefixes every line of every traceback with "[rank0]:".
        sys.excepthook = hook
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    return device


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Import Megatron inside this block: no warnings about absent Apex and Transformer Engine, half the time.

    Megatron decorates its fused kernels with `torch.compile`, and the decoration alone loads Dynamo and Inductor.
    `shared.megatron.model` switches those kernels off, so without a GPU the decorator is made to do nothing.
    """
    compile_ = torch.compile
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine).*", category=UserWarning)
        if not torch.cuda.is_available() and "megatron.core" not in sys.modules:
            torch.compile = _leave_eager  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield
        finally:
            torch.compile = compile_


def _leave_eager(function: Callable[..., Any] | None = None, **_: Any) -> Callable[..., Any]:
    return _leave_eager if function is None else function
