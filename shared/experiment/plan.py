"""Which runs a command means: studies x arms x seeds with their configs, in the order they should start.

plan(EXPERIMENT, "proxy", Selection(arms=("grpo",), seeds=(3,)))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shared.experiment.contracts import AssayError, Experiment, Grid, Study
from shared.experiment.overrides import UnknownName, replace_fields, set_fields, suggest


class NothingToRun(AssayError):
    """The selection is empty."""


class FullScaleNotBuilt(AssayError):
    """The paper's own setting was asked for, and the trainer cannot run it yet."""


@dataclass(frozen=True)
class Selection:
    """What the command line asked for. Empty means the headline set, or everything with `whole_grid`.

    Named studies, arms and seeds are taken from the whole grid; seeds may be any integer. `overrides` maps field names
    to text.
    """

    whole_grid: bool = False
    studies: tuple[str, ...] = ()
    arms: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    overrides: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One run to be had."""

    study: Study
    arm: str
    seed: int
    config: Any

    @property
    def name(self) -> str:
        return f"{self.study.name}/{self.arm} seed {self.seed}"


def arm_config(study: Study, arm: str, scale: str) -> Any:
    """Config that an arm has at a scale."""
    return replace_fields(study.arms[arm], study.scales[scale].overrides)


def plan(experiment: Experiment, scale: str, selection: Selection) -> list[Job]:
    """Runs of the selection.

    Raises `UnknownName` with the closest name, `BadValue`, `NothingToRun`, `FullScaleNotBuilt`.
    """
    known_scales = dict.fromkeys(name for study in experiment.studies for name in study.scales)
    if scale == "full" and scale not in known_scales:
        raise FullScaleNotBuilt(
            "Scale full is not built yet. Training lacks the start from a Hugging Face model, the paper's data and "
            "graders, updates in micro-batches with logits that stay split over the ranks, and rollouts by vLLM "
            f"servers. To see what such a run needs, and its launch files: python -m papers dryrun {experiment.paper}"
        )
    if scale not in known_scales:
        raise suggest("scale", scale, known_scales)
    _check_names(experiment, selection)
    jobs: list[Job] = []
    for study in experiment.studies:
        if scale not in study.scales or (selection.studies and study.name not in selection.studies):
            continue
        for arm, seed in _cells(study, scale, selection):
            jobs.append(Job(study, arm, seed, _overridden(study, arm, scale, selection.overrides)))
    if not jobs:
        raise NothingToRun(_why_nothing(experiment, scale, selection))
    return sorted(jobs, key=lambda job: _urgency(experiment, job))


def _check_names(experiment: Experiment, selection: Selection) -> None:
    studies = {study.name: study for study in experiment.studies}
    for name in selection.studies:
        if name not in studies:
            raise suggest("study", name, studies)
    chosen = [studies[name] for name in selection.studies] or list(experiment.studies)
    arms = dict.fromkeys(arm for study in chosen for arm in study.arms)
    for name in selection.arms:
        if name not in arms:
            raise suggest("arm", name, arms)


def _cells(study: Study, scale: str, selection: Selection) -> list[tuple[str, int]]:
    grid = study.scales[scale]
    whole_arms = grid.arms if grid.arms is not None else tuple(study.arms)
    part: Grid | None = grid
    if scale == "proxy" and not selection.whole_grid:
        part = study.headline
        if part is None and not selection.studies:
            return []
    part = part if part is not None else grid
    part_arms = part.arms if part.arms is not None else whole_arms
    arms = [arm for arm in whole_arms if arm in (selection.arms or part_arms)]
    return [(arm, seed) for seed in (selection.seeds or part.seeds) for arm in arms]


def _overridden(study: Study, arm: str, scale: str, overrides: Mapping[str, str]) -> Any:
    try:
        return set_fields(arm_config(study, arm, scale), overrides)
    except UnknownName as error:
        raise UnknownName(
            f"Study {study.name}, arm {arm}: {error} Use --study to say which studies are meant."
        ) from error


def _urgency(experiment: Experiment, job: Job) -> tuple[bool, float, int, int]:
    """Runs behind headline claims first, then the longest, seed by seed, so that pairs are complete early."""
    judged = any(
        claim.headline and claim.study == job.study.name and job.arm in claim.contrast for claim in experiment.claims
    )
    return not judged, -job.study.cost_cpu_s, job.seed, list(job.study.arms).index(job.arm)


def _why_nothing(experiment: Experiment, scale: str, selection: Selection) -> str:
    here = [study for study in experiment.studies if scale in study.scales]
    if selection.studies or selection.arms:
        wanted = ", ".join((*selection.studies, *selection.arms))
        places = [s.name for s in here if set(selection.arms) & set(s.arms)] or [study.name for study in here]
        return f"Nothing matches {wanted} at {scale} scale: name one of its studies with --study ({', '.join(places)})."
    return f"No study of {experiment.paper} has a headline set: add --all."
