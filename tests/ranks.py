"""Run a function as several processes that form one gloo group, forked from a server that has imported Megatron.

def losses(rank: int, config) -> list[float]: ...          # at module level; every rank calls it

per_rank = run_ranks(losses, Layout(tp=2), config)         # results in rank order; a failing rank raises here
"""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from shared.megatron.layout import Layout

PRELOAD = ["torch._dynamo", "shared.training.sft", "shared.training.pretrain", "shared.rl.trainer"]
PRELOAD += ["transformers.models.llama.configuration_llama"]  # 2 CPU-seconds in every rank that reads a folder


def run_ranks(function: Callable[..., Any], layout: Layout, *args: Any, timeout: float = 120.0) -> list[Any]:
    """`function(rank, *args)` on every rank of `layout`, groups initialised. Raises what a rank raised, as text."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(layout.world_size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_rank, args=(function, layout, rank, f"{folder}/store", args, theirs))
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            return _collect(pipes, timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(pipes: list[Any], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    end = time.monotonic() + timeout
    while len(results) < len(pipes):
        ready = wait([pipe for rank, pipe in enumerate(pipes) if rank not in results], timeout=end - time.monotonic())
        if not ready:
            raise TimeoutError(f"ranks {sorted(set(range(len(pipes))) - set(results))} gave no answer in {timeout} s")
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                error, results[rank] = pickle.loads(pipe.recv_bytes())
            except EOFError:
                raise RuntimeError(f"rank {rank} died without an answer") from None
            if error:
                raise RuntimeError(f"rank {rank} failed:\n{error}")
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    function: Callable[..., Any], layout: Layout, rank: int, store: str, args: tuple[Any, ...], answer: Any
) -> None:
    import torch
    import torch.distributed as dist

    from shared.megatron.init import initialize

    torch.set_num_threads(1)
    try:
        files = dist.FileStore(str(Path(store)), layout.world_size)
        dist.init_process_group("gloo", store=files, rank=rank, world_size=layout.world_size)
        initialize("cpu", layout)
        # A rank that is through may end, and closes its connections: not while another is still making its own.
        dist.barrier()
        answer.send_bytes(_packed(None, function(rank, *args)))
    except BaseException:
        answer.send_bytes(_packed(traceback.format_exc(), None))


def _packed(error: str | None, result: Any) -> bytes:
    """Tensors by value: torch would send a handle of memory that goes with the process."""
    return pickle.dumps((error, result))
