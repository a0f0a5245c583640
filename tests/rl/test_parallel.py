"""The RL trainer on several ranks: the rows of one process, and a resume that gives them too."""

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shared.experiment.contracts import Interrupted
from shared.megatron.layout import ImpossibleLayout, Layout
from shared.megatron.model import build_model
from shared.rl.saves import OtherKindOfCheckpoint
from shared.rl.trainer import train_rl
from shared.rl.update import LocalUpdate, ParallelUpdate
from shared.training.checkpoint import save_weights
from tests.ranks import run_ranks
from tests.rl.test_learner import FirstTokenEven, Run, config

CONFIG = config(task=FirstTokenEven(), rollouts=4, checkpoint_every=1)


class Ranked(Run):
    """Each rank keeps a record of its own, so that all of them can be compared; the rest is common."""

    def artifact(self, name: str) -> Path:
        return self.dir.parent / name

    @property
    def checkpoints(self) -> Path:
        folder = self.dir.parent / "checkpoints"
        folder.mkdir(exist_ok=True)
        return folder


def train(rank: int, path: Path, stop_after: int = 10**9) -> list[dict[str, float]]:
    with Ranked.open(path / f"rank{rank}", CONFIG, 0) as run:
        run.stop_after = stop_after
        with contextlib.suppress(Interrupted):
            train_rl(run)
        return run.rows()


@pytest.fixture
def folder(tmp_path) -> Path:
    return with_warm_start(tmp_path)


def with_warm_start(path: Path) -> Path:
    (path / "warm").mkdir(parents=True)
    save_weights(path / "warm" / "weights.safetensors", build_model(CONFIG.model, 3).state_dict())
    return path


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> list[dict[str, float]]:
    return train(0, with_warm_start(tmp_path_factory.mktemp("one")))


def assert_same_rows(rows, expected):
    assert [row.keys() for row in rows] == [row.keys() for row in expected]
    for row, wanted in zip(rows, expected, strict=True):
        for name, value in wanted.items():
            assert row[name] == pytest.approx(value, rel=2e-5, abs=2e-6), (row["step"], name)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(dp=2),
        Layout(tp=2),
        Layout(tp=2, sequence_parallel=True),
        Layout(dp=2, distributed_optimizer=True),
        Layout(tp=2, dp=2),
    ],
    ids=str,
)
def test_rows_are_those_of_one_process(layout, one_process, folder):
    per_rank = run_ranks(train, layout, folder)
    assert all(rows == per_rank[0] for rows in per_rank)
    assert_same_rows(per_rank[0], one_process)


@pytest.mark.parametrize("layout", [Layout(dp=2), Layout(tp=2)], ids=str)
def test_a_stopped_run_goes_on_to_the_same_rows(layout, tmp_path):
    whole, cut = with_warm_start(tmp_path / "whole"), with_warm_start(tmp_path / "cut")
    assert len(run_ranks(train, layout, cut, 2)[0]) == 2
    assert run_ranks(train, layout, cut) == run_ranks(train, layout, whole)


def test_a_run_goes_on_under_another_layout(one_process, folder):
    run_ranks(train, Layout(tp=2, sequence_parallel=True), folder, 2)
    assert_same_rows(run_ranks(train, Layout(dp=2, distributed_optimizer=True), folder)[0], one_process)


@pytest.mark.parametrize("first", [Layout(), Layout(dp=2)], ids=str)
def test_one_process_and_several_do_not_go_on_with_each_others_checkpoints(first, folder):
    _run(first, folder, 2)
    with pytest.raises((RuntimeError, OtherKindOfCheckpoint), match="written by"):
        _run(Layout(dp=3 - first.dp), folder, 4)


def _run(layout: Layout, path: Path, stop_after: int) -> None:
    if layout.world_size == 1:
        train(0, path, stop_after)
    else:
        run_ranks(train, layout, path, stop_after)


def _weights_after_steps(rank: int, kind: type) -> dict[str, torch.Tensor]:
    """Three steps with strong decay of all weights, on gradients that are a function of the weights."""
    optimizer = replace(CONFIG.optimizer, weight_decay=0.5, body_lr=1e-2)
    model = replace(CONFIG.model, tie_embeddings=False)
    if kind is LocalUpdate:
        whole = build_model(model, seed=0)
        update = LocalUpdate(optimizer, whole)
    else:
        update = ParallelUpdate(optimizer, model)
        whole = update.parallel.chunks[0]
    for _ in range(3):
        loss = sum((parameter.sin() ** 2).sum() for parameter in whole.parameters())
        update.step(loss, scale=0.5)
    return {name: parameter.detach().clone() for name, parameter in whole.named_parameters()}


def test_both_kinds_of_update_are_the_same_adamw():
    """Norms decay too, and the head learns at its own rate."""
    local = _weights_after_steps(0, LocalUpdate)
    parallel = run_ranks(_weights_after_steps, Layout(), ParallelUpdate)[0]
    for name, weight in local.items():
        torch.testing.assert_close(parallel[name], weight, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_what_the_trainer_does_not_do_is_refused(folder):
    with pytest.raises(RuntimeError, match=f"{ImpossibleLayout.__name__}.*does not run under pp"):
        run_ranks(train, Layout(pp=2), folder)
