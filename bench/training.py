"""Training speed: full steps of GPTModel, transformers' Llama and a minimal Llama on the same weights and tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.contestants import Step, contestants
from bench.measure import ratios, rounds, spread
from bench.shapes import TRAINING, TrainingShape
from shared.experiment.contracts import AssayError

OURS = ("assay", "assay-parallel")
WARM_UP = 3
TOLERANCE = 1e-5


class NotTheSameModel(AssayError):
    """Contestants disagree about the loss of the first batch."""


def measure(repetitions: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """One entry per shape: CPU-seconds a step, tokens per CPU-second and ratios of every contestant."""
    torch.set_num_threads(1)
    entries = []
    for shape in TRAINING:
        steps = contestants(shape.model)
        tokens_BT, labels_BT = batch(shape)
        losses = agreed_losses(steps, tokens_BT, labels_BT)
        for _ in range(WARM_UP - 1):
            for step in steps.values():
                step(tokens_BT, labels_BT)
        turns = {name: _turn(step, shape.steps, tokens_BT, labels_BT) for name, step in steps.items()}
        clocks = {name: [c.cpu_s / shape.steps for c in found] for name, found in rounds(turns, repetitions).items()}
        entries.append(entry(shape, clocks, losses))
        say(f"{shape.name}: " + ", ".join(f"{n} {r['tokens_per_cpu_s']:,.0f}" for n, r in entries[-1]["rows"].items()))
    return entries


def batch(shape: TrainingShape) -> tuple[Tensor, Tensor]:
    """Random tokens and the same shifted by one, [batch, length] int64 each."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(shape.model.vocab_size, (shape.batch, shape.length + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def agreed_losses(steps: dict[str, Step], tokens_BT: Tensor, labels_BT: Tensor) -> dict[str, float]:
    """Take one step with each and return its loss. Raises `NotTheSameModel` beyond 1e-5."""
    losses = {name: step(tokens_BT, labels_BT) for name, step in steps.items()}
    if max(losses.values()) - min(losses.values()) > TOLERANCE:
        raise NotTheSameModel(f"losses of the first batch are {losses}: they must agree to {TOLERANCE} to be compared")
    return losses


def _turn(step: Step, steps: int, tokens_BT: Tensor, labels_BT: Tensor) -> Callable[[], None]:
    def turn() -> None:
        for _ in range(steps):
            step(tokens_BT, labels_BT)

    return turn


def entry(shape: TrainingShape, clocks: dict[str, list[float]], losses: dict[str, float]) -> dict[str, Any]:
    """JSON of one shape from CPU-seconds a step, one per round."""
    rows: dict[str, Any] = {}
    for name, seconds in clocks.items():
        middle = spread(seconds)["median"]
        rows[name] = {
            "loss": losses[name],
            "cpu_s": [round(value, 6) for value in seconds],
            "tokens_per_cpu_s": round(shape.batch * shape.length / middle, 1),
        }
        if name in OURS:
            peers = {peer: values for peer, values in clocks.items() if peer not in OURS}
            rows[name]["ratio"] = {peer: rounded(ratios(seconds, values)) for peer, values in peers.items()}
    met = all(ratio["median"] >= shape.target for ratio in rows["assay"]["ratio"].values())
    return {"shape": shape.name, "target": shape.target, "met": met, "rows": rows}


def rounded(values: dict[str, float]) -> dict[str, float]:
    """Three digits after the point: the clock knows no more."""
    return {name: round(value, 3) for name, value in values.items()}
