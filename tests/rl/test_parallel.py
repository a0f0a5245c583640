"""The RL trainer on several ranks: the rows of one process, and a resume that gives them too."""

import contextlib
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shared.experiment.contracts import Interrupted
from shared.megatron.init import current_layout
from shared.megatron.layout import ImpossibleLayout, Layout
from shared.megatron.model import build_model
from shared.rl.aggregate import Aggregation
from shared.rl.config import BadRLConfig, RLConfig
from shared.rl.learner import Learner
from shared.rl.pipeline import Terms
from shared.rl.replay import stored_rollout
from shared.rl.saves import OtherKindOfCheckpoint
from shared.rl.trainer import train_rl
from shared.rl.update import LocalUpdate, ParallelUpdate
from shared.training.checkpoint import save_weights
from tests.ranks import run_ranks
from tests.rl.test_learner import FirstTokenEven, Run, config

BASE = config(task=FirstTokenEven(), rollouts=4, checkpoint_every=1, dynamic_sampling="drop")
# Each part of the loss has a divisor of its own, and the warm-up outlasts the run.
CONFIG = replace(
    BASE,
    terms=Terms("token-mean", entropy_coef=0.2, positive_coef=0.7),
    optimizer=replace(BASE.optimizer, warmup_rollouts=6),
)
AGGREGATIONS: tuple[Aggregation, ...] = ("seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")


class Ranked(Run):
    """Each rank keeps a record of its own, so that all of them can be compared; the rest is common."""

    def artifact(self, name: str) -> Path:
        return self.dir.parent / name

    @property
    def checkpoints(self) -> Path:
        folder = self.dir.parent / "checkpoints"
        folder.mkdir(exist_ok=True)
        return folder


def train(rank: int, path: Path, stop_after: int = 10**9, conf: RLConfig = CONFIG) -> list[dict[str, float]]:
    with Ranked.open(path / f"rank{rank}", conf, 0) as run:
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


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_every_aggregation_divides_by_the_whole_mini_batch(aggregation, tmp_path):
    conf = replace(CONFIG, terms=replace(CONFIG.terms, aggregation=aggregation), rollouts=2, epochs=2)
    expected = train(0, with_warm_start(tmp_path / "one"), conf=conf)
    assert_same_rows(run_ranks(train, Layout(dp=2), with_warm_start(tmp_path / "two"), 9, conf)[0], expected)


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


def _scored_and_updated(rank: int, rows: int) -> tuple[torch.Tensor, dict[str, float]]:
    conf = replace(BASE, prompts=rows, samples=1, minibatches=1)
    batch = stored_rollout(conf, 0)
    model = replace(conf.model, tie_embeddings=False)
    if current_layout().world_size == 1:
        learner = Learner(conf, build_model(model, 0))
    else:
        update = ParallelUpdate(conf.optimizer, model)
        learner = Learner(conf, update.parallel.chunks[0], update)
    return learner.score(batch)[0], learner.update(batch, seed=0, rollout=0)


def test_ranks_without_rows_take_part():
    logp_BT, metrics = _scored_and_updated(0, 2)
    for scored_BT, measured in run_ranks(_scored_and_updated, Layout(dp=3), 2):
        torch.testing.assert_close(scored_BT, logp_BT, atol=1e-6, rtol=1e-5)
        assert measured == pytest.approx(metrics, rel=2e-5, abs=2e-6)


def _steps(rank: int, losses: list[float]) -> tuple[tuple[float, float], bool]:
    """One step whose loss differs between ranks; and whether it changed a weight."""
    update = ParallelUpdate(CONFIG.optimizer, replace(CONFIG.model, tie_embeddings=False))
    parameters = list(update.parallel.chunks[0].parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    loss = sum((parameter**2).sum() for parameter in parameters)
    outcome = update.step(loss * 0 + losses[rank], scale=1.0)
    return outcome, any(not torch.equal(a, b) for a, b in zip(before, parameters, strict=True))


def test_a_loss_is_summed_over_ranks_and_stops_all_of_them_if_one_is_not_finite():
    assert [outcome[0] for outcome, _ in run_ranks(_steps, Layout(dp=2), [1.0, 2.0])] == [3.0, 3.0]
    for (total, norm), changed in run_ranks(_steps, Layout(dp=2), [1.0, math.nan]):
        assert math.isnan(total)
        assert not math.isfinite(norm)
        assert not changed


def test_clipping_can_be_switched_off_and_rates_are_positive():
    optimizer = replace(CONFIG.optimizer, grad_clip=0.0)
    model = build_model(replace(CONFIG.model, tie_embeddings=False), seed=0)
    before = model.output_layer.weight.detach().clone()
    LocalUpdate(optimizer, model).step((model.output_layer.weight**2).sum(), scale=1.0)
    assert not torch.equal(before, model.output_layer.weight)
    for wrong in ({"body_lr": 0.0}, {"head_lr": -1.0}, {"grad_clip": -1.0}):
        with pytest.raises(BadRLConfig, match=next(iter(wrong))):
            replace(CONFIG.optimizer, **wrong)


def test_what_the_trainer_does_not_do_is_refused(folder):
    with pytest.raises(RuntimeError, match=f"{ImpossibleLayout.__name__}.*does not run under pp"):
        run_ranks(train, Layout(pp=2), folder)
