"""Runs a function in fresh processes, one per rank: what one check breaks, hangs or leaks does not reach the next.

    answers = on_ranks(losses, "cuda", Layout(tp=2), SIZES)      # losses(SIZES, folder) of both ranks, in rank order

With a GPU they are spawned, since CUDA does not survive a fork; without one they can be forked from a server that has
imported Megatron once. On a CPU they see no GPU: Megatron's CPU shim is for processes without one.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any, Literal

from shared.experiment.contracts import AssayError
from shared.megatron.layout import Layout

Device = Literal["cuda", "cpu"]
TIMEOUT = 180.0
PRELOAD = ["torch._dynamo", "shared.gpucheck.subjects"]


class RankFailed(AssayError):
    """A process of a check raised, died or gave no answer in time. `trace` is its traceback, if there is one."""

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message)
        self.trace = trace


def on_ranks(
    function: Callable[..., Any],
    device: Device,
    layout: Layout,
    *args: Any,
    spawn: bool | None = None,
    timeout: float = TIMEOUT,
) -> list[Any]:
    """`function(*args, folder)` on every rank, groups set up; `folder` is temporary and common. Raises `RankFailed`.

    spawn: start interpreters instead of forking a server, as GPUs need; None means where `device` is one.
    """
    spawn = device == "cuda" if spawn is None else spawn
    context: Any = multiprocessing.get_context("spawn" if spawn else "forkserver")
    if not spawn:
        context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder, _seeing(device):
        pipes, processes = [], []
        for rank in range(layout.world_size):
            ours, theirs = context.Pipe(duplex=False)
            work = (function, device, layout, rank, args, folder, theirs)
            process = context.Process(target=_rank, args=work)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            return _collect(pipes, time.monotonic() + timeout, timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()


@contextmanager
def _seeing(device: Device) -> Iterator[None]:
    """Processes started inside see the GPUs that we see, or none."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def _collect(pipes: list[Any], end: float, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        open_pipes = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready: list[Any] = wait(open_pipes, timeout=max(0.0, end - time.monotonic()))
        if not ready:
            raise RankFailed(f"no answer within {timeout:g} s")
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                error, trace, results[rank] = pickle.loads(pipe.recv_bytes())
            except EOFError:
                raise RankFailed(f"rank {rank} died without an answer") from None
            if error:
                raise RankFailed(error, trace)
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    function: Callable[..., Any],
    device: Device,
    layout: Layout,
    rank: int,
    args: tuple[Any, ...],
    folder: str,
    answer: Any,
) -> None:
    try:
        _join(device, layout, rank, folder)
        answer.send_bytes(pickle.dumps(("", "", function(*args, folder))))
    except BaseException as error:
        said = " ".join(str(error).split()) or "no message"
        answer.send_bytes(pickle.dumps((f"{type(error).__name__}: {said}", traceback.format_exc(), None)))
    sys.stdout.flush()
    # Not through nccl's destructors, which may wait for a rank that is gone.
    os._exit(0)


def _join(device: Device, layout: Layout, rank: int, folder: str) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    import torch
    import torch.distributed as dist

    from shared.megatron.init import initialize

    # Without TF32, which rounds the factors of float32 products to 10 bits.
    torch.set_float32_matmul_precision("highest")
    if (device == "cuda") != torch.cuda.is_available():
        raise RankFailed(f"torch sees {torch.cuda.device_count()} GPUs in a process that is to run on {device}")
    backend = "gloo"
    if device == "cuda":
        torch.cuda.set_device(rank)
        backend = "cpu:gloo,cuda:nccl"
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // layout.world_size))
    if layout.world_size > 1:
        store = dist.FileStore(f"{folder}/store", layout.world_size)  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=rank, world_size=layout.world_size)
    initialize(layout=layout)
