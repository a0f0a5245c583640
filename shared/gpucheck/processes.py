"""Runs a function in fresh processes, one per rank: what one check breaks, hangs or leaks does not reach the next.

    answers = on_ranks(losses, "cuda", Layout(tp=2), SIZES)      # losses(SIZES, folder) of both ranks, in rank order

With a GPU they are spawned, since CUDA does not survive a fork; without one they can be forked from a server that has
imported Megatron once. On a CPU they see no GPU: Megatron's CPU shim is for processes without one.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
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
        _store, environments = _environments(layout)
        try:
            for environment in environments:
                ours, theirs = context.Pipe(duplex=False)
                work = (function, device, layout, environment, args, folder, theirs)
                process = context.Process(target=_rank, args=work)
                process.start()
                theirs.close()
                pipes.append(ours)
                processes.append(process)
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
    environment: Mapping[str, str],
    args: tuple[Any, ...],
    folder: str,
    answer: Any,
) -> None:
    os.environ.update(environment)
    try:
        _join(device, layout)
        answer.send_bytes(pickle.dumps(("", "", function(*args, folder))))
    except BaseException as error:
        said = " ".join(str(error).split()) or "no message"
        answer.send_bytes(pickle.dumps((f"{type(error).__name__}: {said}", traceback.format_exc(), None)))
    # The parent ends all ranks once it has every answer: until then another one may still read what this one sent.
    time.sleep(60)


def _join(device: Device, layout: Layout) -> None:
    import torch

    from shared.megatron.init import initialize

    if device == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // layout.world_size))
    # Without TF32, which rounds the factors of float32 products to 10 bits.
    torch.set_float32_matmul_precision("highest")
    found = initialize(layout=layout)
    if found.type != device:
        raise RankFailed(f"the process is to run on {device}, and torch offers it {found}")


def _environments(layout: Layout) -> tuple[Any, list[dict[str, str]]]:
    """A store in this process and, per rank, the variables under which torchrun would start it."""
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(layout.world_size),
        # The store is there already: no rank opens another one.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    return store, [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(layout.world_size)]
