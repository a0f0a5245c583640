"""Saving and loading a 60 MB training state: our checkpoints against torch.save and torch.load."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.contestants import ADAMW
from bench.measure import Clock, rounds, scratch, spread
from bench.shapes import BETAS, LR, STATE, WEIGHT_DECAY
from shared.experiment.files import sync_folder
from shared.megatron.config import ModelConfig
from shared.megatron.layout import Layout
from shared.megatron.model import build_model, forward_logits
from shared.megatron.parallel import Microbatch, ParallelModel
from shared.training.checkpoint import Checkpoints
from shared.training.distributed_checkpoint import DistributedCheckpoints
from shared.training.manifest import Contents

Turns = dict[str, Callable[[], object]]


def measure(repetitions: int, say: Callable[[str], None], config: ModelConfig = STATE) -> list[dict[str, Any]]:
    """One entry for saving and one for loading: wall seconds and MB/s of every way."""
    torch.set_num_threads(1)
    state = training_state(config)
    megabytes = sum(tensor.nbytes for tensor in _tensors(state)) / 1e6
    entries = []
    with scratch() as folder:
        ours = DistributedCheckpoints(folder / "distributed")
        for what, turns in ways(folder, state, config, ours).items():

            def settle() -> None:
                ours.wait()
                os.sync()  # or one way's unwritten pages would slow the next one's fsync

            entries.append(entry(what, megabytes, rounds(turns, repetitions, settle)))
            settle()
            say(f"{what}: " + ", ".join(f"{n} {r['mb_per_s']:,.0f} MB/s" for n, r in entries[-1]["rows"].items()))
    return entries


def training_state(config: ModelConfig) -> dict[str, Any]:
    """Model and AdamW after one step, as the trainers save them."""
    model = build_model(config, seed=0, device="cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)
    forward_logits(model, torch.zeros(1, 8, dtype=torch.int64)).mean().backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def parallel_model(config: ModelConfig) -> tuple[ParallelModel, Contents]:
    """The same model behind Megatron's optimizer, and what its checkpoints say about it."""
    model = ParallelModel(config, ADAMW, seed=0, device="cpu")
    zeros = torch.zeros(1, 8, dtype=torch.int64)
    model.train_step([Microbatch(zeros, zeros, torch.ones(1, 8))], LR)
    contents = Contents(config, Layout(), ADAMW, precision="fp32", data=None, seed=0, consumed_samples=0)
    return model, contents


def ways(folder: Path, state: dict[str, Any], config: ModelConfig, ours: DistributedCheckpoints) -> dict[str, Turns]:
    """What is timed, for "save" and "load". Loads read what the saves wrote."""
    model, contents = parallel_model(config)
    checkpoints = Checkpoints(folder / "checkpoints")
    plain, synced = folder / "plain.pt", folder / "synced.pt"

    def load_distributed() -> None:
        reader = DistributedCheckpoints(ours.directory)  # a fresh one, which verifies every byte
        stored = reader.latest()
        assert stored is not None
        wanted = model.sharded_state(loading=True)
        model.load_sharded_state(reader.load(stored, wanted, model=config, precision="fp32"))

    return {
        "save": {
            "Checkpoints": lambda: checkpoints.save(1, state),
            "DistributedCheckpoints": lambda: ours.save(1, model.sharded_state(), contents),
            "DistributedCheckpoints, async": lambda: ours.save(1, model.sharded_state(), contents, asynchronous=True),
            "torch.save": lambda: torch.save(state, plain),
            "torch.save + fsync": lambda: save_and_sync(state, synced),
        },
        "load": {
            "Checkpoints": checkpoints.latest,
            "DistributedCheckpoints": load_distributed,
            "torch.load": lambda: torch.load(plain, weights_only=True),
        },
    }


def save_and_sync(state: dict[str, Any], path: Path) -> None:
    """torch.save, then the file and its folder on the disk."""
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)


def entry(what: str, megabytes: float, clocks: dict[str, list[Clock]]) -> dict[str, Any]:
    """JSON of one table row per way."""
    rows = {}
    for name, found in clocks.items():
        walls = [clock.wall_s for clock in found]
        rows[name] = {
            "wall_s": [round(value, 4) for value in walls],
            "cpu_s": [round(clock.cpu_s, 4) for clock in found],
            "mb_per_s": round(megabytes / spread(walls)["median"], 1),
        }
    return {"what": what, "megabytes": round(megabytes, 1), "rows": rows}


def _tensors(state: Any) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return [tensor for value in values for tensor in _tensors(value)]
