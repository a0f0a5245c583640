"""Everybody has the same model, gets the same turns, and is compared with the right side on top."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from bench import checkpoints
from bench.contestants import MAKERS, contestants
from bench.measure import ratios, rounds
from bench.shapes import TRAINING
from bench.training import NotTheSameModel, agreed_losses, batch, entry

SMALL = TRAINING[-1]


def test_all_contestants_take_the_same_steps() -> None:
    """Three steps: weights, gradients, clipping and AdamW agree, not only the first forward pass."""
    steps = contestants(SMALL.model)
    assert list(steps) == ["assay", "assay-parallel", "transformers", "minimal"]
    tokens_BT, labels_BT = batch(SMALL)
    first, *_, last = (agreed_losses(steps, tokens_BT, labels_BT) for _ in range(3))
    assert last["assay"] < first["assay"] - 0.01


def test_grouped_queries_and_an_untied_head_agree_too() -> None:
    model = dataclasses.replace(SMALL.model, num_query_groups=1, tie_embeddings=False)
    agreed_losses(contestants(model), *batch(SMALL))


def test_another_model_is_not_compared() -> None:
    steps = {"assay": MAKERS["assay"](SMALL.model), "minimal": lambda tokens_BT, labels_BT: 5.0}
    with pytest.raises(NotTheSameModel, match="minimal"):
        agreed_losses(steps, *batch(SMALL))


def test_rounds_rotate_and_settle_before_every_turn() -> None:
    said: list[str] = []
    turns = {name: lambda name=name: said.append(name) for name in "ABC"}
    clocks = rounds(turns, 2, between=lambda: said.append("-"))
    assert "".join(said) == "-A-B-C-B-C-A"
    assert {name: len(found) for name, found in clocks.items()} == {"A": 2, "B": 2, "C": 2}


def test_a_ratio_above_one_means_that_ours_took_less() -> None:
    assert ratios([1.0, 2.0, 1.0], [2.0, 2.0, 3.0]) == {"median": 2.0, "low": 1.0, "high": 3.0}
    slow_peer, fast_peer = [1.2, 1.2], [0.8, 0.8]
    for peer, met in ((slow_peer, True), (fast_peer, False)):
        clocks = {"assay": [1.0, 1.0], "transformers": slow_peer, "minimal": peer}
        assert entry(SMALL, clocks, dict.fromkeys(clocks, 5.0))["met"] is met


def test_every_way_of_saving_is_read_back(tmp_path: Path) -> None:
    state = checkpoints.training_state(SMALL.model)
    ours = checkpoints.DistributedCheckpoints(tmp_path / "distributed")
    ways = checkpoints.ways(tmp_path, state, SMALL.model, ours)
    for save in ways["save"].values():
        save()
        ours.wait()
    ways["load"]["DistributedCheckpoints"]()
    _, found = checkpoints.Checkpoints(tmp_path / "checkpoints").latest() or (0, {})
    for loaded in (found, torch.load(tmp_path / "plain.pt"), torch.load(tmp_path / "synced.pt")):
        assert torch.equal(
            loaded["model"]["embedding.word_embeddings.weight"], state["model"]["embedding.word_embeddings.weight"]
        )
