"""One of two ranks is killed: the other does not wait for it, and the run goes on and ends like an undisturbed one.

Equal means to the bit, rows and weights. Most kills hit ranks that were forked from a warm server; one hits a group
that torchrun's agent started.
"""

import functools
import itertools
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.experiment.artifacts import Built
from shared.experiment.codehash import run_hash
from shared.experiment.contracts import RunContext
from shared.experiment.group import GroupTask, RankFailed
from shared.experiment.records import read_rows, read_summary
from shared.megatron.layout import Layout
from tests.ranks import run_ranks
from tests.reliability.campaign import attempt
from tests.reliability.faults import Faults
from tests.reliability.subjects import PRETRAIN, PROVENANCE, RL, pretraining, rl, warm_start

DP2 = Layout(dp=2)
SHARDED = Layout(dp=2, distributed_optimizer=True)
KINDS = {"pretraining": (pretraining, PRETRAIN, SHARDED), "RL": (rl, RL, DP2)}
KILLS = 3
EVENTS = {"pretraining": 1500, "RL": 1000}


def task_of(kind: str, path: Path, run: Callable[[RunContext], dict[str, Any]] | None = None) -> GroupTask:
    function, config, layout = KINDS[kind]
    warm = {"warm": Built(warm_start(path.parent / "warm"), "warm-1", "content")}
    run = run or function
    origin = {**PROVENANCE, "layout": str(layout), "code_hash": run_hash("campaign", run, {"warm": "warm-1"})}
    return GroupTask(run, path, config, 0, "main", "main", "smoke", warm, origin, "campaign", layout)


def whole(rank: int, task: GroupTask) -> None:
    from shared.experiment.ranks import run_on_ranks

    run_on_ranks(task)


def killed(rank: int, task: GroupTask, victim: int, at: int) -> None:
    """Rank `victim` dies at an event of the given number, unless the run is over before."""
    if rank != victim:
        return whole(rank, task)
    task.path.mkdir(parents=True, exist_ok=True)
    with Faults(task.path, kill_at=at, how="torn"):
        return whole(rank, task)


def result(path: Path) -> tuple[Any, Any]:
    return read_summary(path)["summary"], read_rows(path / "metrics.jsonl")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Callable[[str], Any]:
    @functools.cache
    def of(kind: str) -> Any:
        task = task_of(kind, tmp_path_factory.mktemp(kind) / "run")
        run_ranks(whole, task.layout, task)
        return result(task.path)

    return of


def error_of(function: Callable[..., None], task: GroupTask, *args: int) -> str:
    """What the first rank to end said, or nothing when the run is complete."""
    try:
        run_ranks(function, task.layout, task, *args)
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_ranks_and_equal_resumes(tmp_path, undisturbed, kind):
    rng, kills = random.Random(kind), 0
    for attempts in itertools.count():
        task = task_of(kind, tmp_path / f"run{attempts}")
        while kills < KILLS and (said := error_of(killed, task, rng.randrange(2), rng.randrange(EVENTS[kind]))):
            assert "died without an answer" in said or "Connection" in said
            kills += 1
        assert error_of(whole, task) == ""
        assert result(task.path) == undisturbed(kind)
        if kills == KILLS:
            break


def dying(run: RunContext) -> dict[str, Any]:
    """Pretraining whose rank 1 is killed after its third step."""
    if os.environ["RANK"] == "1":
        seen: list[int] = []
        progress = type(run).progress

        def struck(self: RunContext, done: int, total: int) -> None:
            seen.append(done)
            if len(seen) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            progress(self, done, total)

        type(run).progress = struck
    return pretraining(run)


def what_torchrun_said(task: GroupTask) -> str:
    try:
        task.execute(print)
    except RankFailed as error:
        return str(error)
    return "complete"


@pytest.mark.slow
def test_a_killed_rank_of_torchrun_ends_the_group_and_the_run_goes_on(tmp_path, undisturbed):
    started = time.monotonic()
    _, said = attempt(what_torchrun_said, task_of("pretraining", tmp_path / "run", dying))
    assert "rank 1 of 2 was killed by SIGKILL" in said
    assert time.monotonic() - started < 60, "importing included"
    assert len(read_rows(tmp_path / "run" / "metrics.jsonl")) == 3
    task = task_of("pretraining", tmp_path / "run")
    assert error_of(whole, task) == ""
    assert result(task.path) == undisturbed("pretraining")
