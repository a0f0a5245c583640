"""What a paper declares, and what a run is given. Standard library only, so that declarations import fast.

    Experiment -> Artifact*  shared products (a warm-started policy, a tokenizer), built once per scale
               -> Study*     arms x seeds, one `run` function
               -> Claim*     a statement, the contrast that tests it, a threshold fixed before the runs

See docs/architecture.md for the life of a run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from shared.experiment.results import Results

Strength = Literal["must", "should", "may"]
Side = Literal["greater", "less"]
Unit = Literal["seed", "item", "point"]
Scale = Literal["smoke", "proxy", "gpu", "full"]


@dataclass(frozen=True)
class Card:
    """Torch-free description of a paper, `CARD` in `papers/<paper>/__init__.py`; all that `papers list` reads.

    `cost_cpu_s` gives the CPU-seconds of the headline set and of the whole grid at proxy scale.
    """

    paper: str
    title: str
    arxiv: str
    claims: tuple[str, ...]
    scales: tuple[Scale, ...]
    cost_cpu_s: Mapping[str, float]
    data: tuple[str, ...] = ()


@dataclass(frozen=True)
class Artifact:
    """A shared product. `build(config, directory)` writes files into an empty directory.

    `config` is a frozen dataclass; `overrides[scale]` replaces fields of it at that scale.
    The content address is a hash of name, config and the code that `build` can reach.
    """

    name: str
    build: Callable[[Any, Path], None]
    config: Any
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    cost_cpu_s: float = 0.0


@dataclass(frozen=True)
class Grid:
    """Which arms and seeds a study runs at a scale. `arms=None` means every arm of the study."""

    seeds: tuple[int, ...]
    arms: tuple[str, ...] | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """Arms x seeds of one question. `run(context)` trains one arm with one seed and returns the summary.

    `arms` maps a name to a frozen dataclass, printed whole into each record. `headline` is the part of
    `scales["proxy"]` that the default command runs; `None` means that only `--all` runs the study.
    `cost_cpu_s` is the expected cost of one run at proxy scale, for the first estimate of the remaining time.
    `canary` names the arm whose first steps CI replays. `curves` names the metrics whose rows are committed when the
    study is promoted, all of them when empty; summaries are always committed whole. `parallel` names the fields of
    `shared.megatron.layout.Layout` that `run` can follow (`("tp", "dp")`); without any, a run is one process.
    """

    name: str
    question: str
    arms: Mapping[str, Any]
    run: Callable[[RunContext], dict[str, Any]]
    scales: Mapping[str, Grid]
    headline: Grid | None = None
    artifacts: tuple[str, ...] = ()
    cost_cpu_s: float = 1.0
    canary: str | None = None
    curves: tuple[str, ...] = ()
    parallel: tuple[str, ...] = ()


@dataclass(frozen=True)
class Claim:
    """A statement of the paper and the contrast that tests it.

    effect = sum over arms of `contrast[arm] * summary[metric]`, per seed (unit="seed": two-sided paired t interval
    over exactly `n` seeds, `n` fixed before the first judged run), or per element where the summaries hold lists
    (unit="item" or "point": BCa bootstrap over at least 30 of them). Reproduced if the 95 % interval lies wholly on
    `side` of `threshold`, contradicted if wholly on the other, else unresolved; fewer than 5 seeds never resolve.
    """

    id: str
    statement: str
    strength: Strength
    study: str
    metric: str
    contrast: Mapping[str, float]
    n: int
    threshold: float = 0.0
    side: Side = "greater"
    unit: Unit = "seed"
    paper_value: str = ""
    headline: bool = False


@dataclass(frozen=True)
class Experiment:
    """Everything that `python -m papers run PAPER` needs; `EXPERIMENT` in `papers/<paper>/experiment.py`.

    `tables` and `figures` map a block name to a function of `Results`: a Markdown string, or a matplotlib figure.
    The README of the paper marks the place: `<!-- assay:table NAME -->` ... `<!-- /assay -->`, same for `figure`.
    """

    paper: str
    artifacts: tuple[Artifact, ...]
    studies: tuple[Study, ...]
    claims: tuple[Claim, ...]
    tables: Mapping[str, Callable[[Results], str]] = field(default_factory=dict)
    figures: Mapping[str, Callable[[Results], Any]] = field(default_factory=dict)


class RunContext(Protocol):
    """One run as its `run` function sees it. Implemented by `shared.experiment.records.RunDirectory`.

    A run that is spread over processes calls `run` in each of them, with `shared.experiment.ranks.RankContext`: groups
    are set up (`current_layout()`), only rank 0 writes, and `rows` and `stop_requested` are collective.
    """

    config: Any
    seed: int
    arm: str
    study: str
    scale: str
    dir: Path

    def artifact(self, name: str) -> Path:
        """Directory of a built artifact that the study declared."""
        ...

    def log(self, step: int, **metrics: float) -> None:
        """Append one row to metrics.jsonl. Deterministic values only; NaN and Inf raise `NonFinite`."""
        ...

    def time(self, step: int, **clocks: float) -> None:
        """Append one row to timing.jsonl: clocks, tokens per second, memory."""
        ...

    def rewind(self, step: int) -> None:
        """Drop logged rows with a step above `step`: called after resuming from a checkpoint of that step."""
        ...

    def rows(self) -> list[dict[str, float]]:
        """All rows of metrics.jsonl so far."""
        ...

    def progress(self, done: int, total: int) -> None:
        """Tell the launcher how far this run is."""
        ...

    def stop_requested(self) -> bool:
        """True once SIGTERM or Ctrl-C arrived: save a checkpoint, then raise `Interrupted`."""
        ...

    @property
    def checkpoints(self) -> Path:
        """Folder for `shared.training.checkpoint.Checkpoints`."""
        ...


class AssayError(Exception):
    """Base of the errors that are reported to a person in one sentence, with what to do next."""


class Interrupted(AssayError):
    """The run saved a checkpoint and stopped because it was asked to."""


class NonFinite(AssayError):
    """A NaN or Inf appeared. Carries step, what was not finite, the batch and the last good checkpoint."""
