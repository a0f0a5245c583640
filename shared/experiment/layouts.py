"""May these runs be spread as `--tp 2` and the like ask for? Answered before anything starts. Standard library only."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from shared.experiment.artifacts import config_at
from shared.experiment.contracts import AssayError, Experiment, Study
from shared.experiment.plan import Job
from shared.megatron.config import ModelConfig
from shared.megatron.layout import Layout


class LayoutNotFollowed(AssayError):
    """A study whose run function does not know how to spread a run that way."""


def check_layout(experiment: Experiment, jobs: Sequence[Job], scale: str, layout: Layout) -> None:
    """Raise `LayoutNotFollowed` for a study that cannot follow, `ImpossibleLayout` for a model that cannot be split.

    Models are looked for in the config of the run and of the artifacts that its study declares, with the
    `sequence_length` beside them. Batches are checked by the run itself, which knows how it makes them.
    """
    asked = [field.name for field in dataclasses.fields(layout) if getattr(layout, field.name) != field.default]
    if not asked:
        return
    for study in {job.study.name: job.study for job in jobs}.values():
        missing = [name for name in asked if name not in study.parallel]
        if missing:
            raise LayoutNotFollowed(_sentence(experiment, study, missing))
    artifacts = {artifact.name: artifact for artifact in experiment.artifacts}
    for job in jobs:
        configs = [job.config, *(config_at(artifacts[name], scale) for name in job.study.artifacts)]
        for model, length in {found for config in configs for found in _models(config)}:
            if length is None:
                layout.check_model(model)
            else:
                layout.check(model, length, microbatches=layout.pp)


def _sentence(experiment: Experiment, study: Study, missing: Sequence[str]) -> str:
    flags = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
    able = [f"{other.name} ({', '.join(other.parallel)})" for other in experiment.studies if other.parallel]
    follows = f"it follows {', '.join(study.parallel)}" if study.parallel else "its runs are one process each"
    way = f", or choose another with --study: {'; '.join(able)}" if able else ""
    return f"Study {study.name} cannot follow {flags}: {follows}. Leave that out{way}."


def _models(config: Any) -> Iterator[tuple[ModelConfig, int | None]]:
    """Every model inside a config, with the `sequence_length` that stands beside it, if one does."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        for value in values.values():
            if isinstance(value, ModelConfig):
                yield value, values.get("sequence_length")
            else:
                yield from _models(value)
