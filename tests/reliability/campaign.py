"""Kill a run again and again until it completes; the children are forked from a server that has imported everything.

    report = kill_until(subject, folder, reference, kills=24, seed=0)

Each attempt dies at a random event (before, after or in the middle of a system call), before a random step's row, or at
a random time, and the next one goes on in the same folder. Whenever an attempt completes, its result must equal the
reference to the bit; then a new chain begins.
"""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from shared.experiment.records import RunDirectory
from tests.ranks import PRELOAD
from tests.reliability.faults import Faults
from tests.reliability.subjects import Subject

LIMIT_S = 60.0
WAYS = ("before", "after", "torn", "step", "time")


@dataclass
class Report:
    """kills: how many of each kind hit. chains: how many runs completed after kills."""

    kills: Counter[str] = field(default_factory=Counter)
    chains: int = 0


@dataclass(frozen=True)
class Reference:
    """An undisturbed run: its result, the kind of each of its events, how many rows and seconds it took."""

    result: dict[str, Any]
    events: list[str]
    steps: int
    seconds: float


def attempt(function: Callable[..., Any], *args: Any, kill_after_s: float | None = None) -> tuple[int, Any]:
    """Exit code (-9 when killed) and answer of `function(*args)` in a forked child. Raises what the child raised."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, "tests.reliability.campaign"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(function, args, theirs))
    process.start()
    theirs.close()
    process.join(LIMIT_S if kill_after_s is None else kill_after_s)
    hangs = process.is_alive() and kill_after_s is None
    process.kill()
    process.join()
    assert not hangs, f"the child went on for {LIMIT_S:.0f} s"
    try:
        error, answer = ours.recv()
    except EOFError:
        error, answer = None, None
    if error:
        raise RuntimeError(f"the child failed:\n{error}")
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode, answer


def _child(function: Callable[..., Any], args: tuple[Any, ...], answer: Any) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        answer.send((None, function(*args)))
    except BaseException:
        answer.send((traceback.format_exc(), None))


def undisturbed(subject: Subject, folder: Path) -> Reference:
    """Run once to the end, counting."""
    _, (events, steps, seconds) = attempt(counted, subject, folder)
    return Reference(subject.result(folder), events, steps, seconds)


def counted(subject: Subject, folder: Path) -> tuple[list[str], int, float]:
    folder.mkdir()
    started = time.monotonic()
    with watching() as steps, Faults(folder) as faults:
        subject.run(folder)
    return [line.split()[0] for line in faults.log], len(steps), time.monotonic() - started


@contextmanager
def watching(kill_at: int | None = None) -> Iterator[list[int]]:
    """Steps logged while it lasts; SIGKILL in place of the one of the given number."""
    steps: list[int] = []
    real = RunDirectory.log

    def log(self: RunDirectory, step: int, **metrics: float) -> None:
        if len(steps) == kill_at:
            signal.raise_signal(signal.SIGKILL)
        steps.append(step)
        real(self, step, **metrics)

    with patch.object(RunDirectory, "log", log):
        yield steps


def disturbed(subject: Subject, folder: Path, way: str, at: int) -> tuple[int, int | None]:
    """Run, or go on, and die on the way unless the run is over before: newest checkpoint found, first step logged."""
    folder.mkdir(exist_ok=True)
    newest = max((int(path.name[5:13]) for path in folder.rglob("checkpoints/step-*")), default=0)
    faults = nullcontext() if way in ("step", "time") else Faults(folder, at, way)  # pyright: ignore[reportArgumentType]
    with watching(at if way == "step" else None) as steps, faults:
        subject.run(folder)
    return newest, steps[0] if steps else None


def kill_until(subject: Subject, folder: Path, reference: Reference, kills: int, seed: int) -> Report:
    """Chains of kills until `kills` have hit; asserts that each chain ends as the reference."""
    rng, report = random.Random(f"{subject.name} {seed}"), Report()
    while sum(report.kills.values()) < kills:
        place, story = folder / f"chain{report.chains}", []
        while True:
            way = rng.choice([way for way in WAYS if report.kills[way] == min(report.kills[w] for w in WAYS)])
            at = rng.randrange(reference.steps) if way == "step" else random_event(rng, reference.events)
            delay = rng.uniform(0.0, reference.seconds) if way == "time" else None
            story.append((way, delay or at))
            code, answer = attempt(disturbed, subject, place, way, at, kill_after_s=delay)
            if code == 0:
                break
            report.kills[way] += 1
        report.chains += 1
        newest, first = answer
        assert first in (newest, None), f"the checkpoint of step {newest} was not used: {story}"
        assert not list(place.rglob("*.damaged-*")), f"a kill cost a record: {story}"
        found = subject.result(place)
        assert found == reference.result, f"{subject.name} differs in {place} after {story}"
    return report


def random_event(rng: random.Random, events: list[str]) -> int:
    """A kind first: most events are small writes, and renames matter as much."""
    kind = rng.choice(sorted(set(events)))
    return rng.choice([number for number, name in enumerate(events) if name == kind])
