"""Process groups for one process or many, and Megatron's imports without their noise.

    device = initialize()                          # one process: the first GPU, else the CPU; calling again is free
    device = initialize(layout=Layout(tp=2))       # in each process that torchrun started
    current_layout()                               # what build_model and the rest then follow

A dense single process needs no patched torch: while it runs without dropout, the one place in Megatron that asks CUDA
for a device is the rotary table, which `shared.megatron.spec` replaces.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from shared.megatron.layout import ImpossibleLayout, Layout

_layout: Layout | None = None


def current_layout() -> Layout:
    """The layout that `initialize` set up; one process if it was not called yet."""
    return _layout or Layout()


def initialize(device: torch.device | str | None = None, layout: Layout | None = None) -> torch.device:
    """Set up Megatron's process groups and return the device to build models on.

    `layout` defaults to the one set up before, else to one process. `device` defaults to this process's GPU when there
    is one, else the CPU. A default group that exists is kept, whoever made it; without one, a single process keeps its
    store inside (no port is opened, parallel processes cannot collide), and several read torchrun's environment.

    Raises `ImpossibleLayout` if the number of processes differs from `layout.world_size`, or if other groups exist.
    """
    global _layout
    wanted = layout or current_layout()
    if wanted.world_size > 1:
        # With more, the kernels of a layer could start before the communication that is to overlap with them.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with quiet_imports():
        from megatron.core import parallel_state
    if not dist.is_initialized():
        _join(wanted)
    if dist.get_world_size() != wanted.world_size:
        raise ImpossibleLayout(
            f"layout {wanted} needs {wanted.world_size} processes and this group has {dist.get_world_size()}: start "
            f"with torchrun --nproc-per-node {wanted.world_size}, or change the layout"
        )
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=wanted.tp,
            pipeline_model_parallel_size=wanted.pp,
            virtual_pipeline_model_parallel_size=wanted.virtual_pp if wanted.virtual_pp > 1 else None,
            context_parallel_size=wanted.cp,
            expert_model_parallel_size=wanted.ep,
            expert_tensor_parallel_size=1,
        )
        _layout = wanted
        if wanted.world_size > 1:
            from shared.megatron.shim import install

            install()
    elif wanted != current_layout():
        raise ImpossibleLayout(f"this process runs layout {current_layout()}; start another one for {wanted}")
    found = torch.device(device or _own_gpu() or "cpu")
    if found.type == "cuda" and found.index is not None:
        # Whoever made the groups: kernels and communication that name no device take the current one.
        torch.cuda.set_device(found)
    return found


def _own_gpu() -> str | None:
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else None


def _join(layout: Layout) -> None:
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    hook = sys.excepthook
    if layout.world_size == 1:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    elif "RANK" not in os.environ:
        raise ImpossibleLayout(
            f"layout {layout} needs {layout.world_size} processes: start with "
            f"torchrun --nproc-per-node {layout.world_size}"
        )
    else:
        if torch.cuda.is_available():
            torch.cuda.set_device(_own_gpu())
        dist.init_process_group(backend)
    # torch.distributed installs a hook that prefixes every line of every traceback with "[rank0]:".
    sys.excepthook = hook


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
