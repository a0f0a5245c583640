"""Markdown table of a study's arms: one row per arm, one column per metric, mean over judged seeds with its interval.

arm_table(results, "full", {"entropy_end": Column("entropy, end"), "clip_low": Column("clip low, %", 100)})
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from shared.experiment.results import Results
from shared.experiment.statistics import paired_t
from shared.experiment.wording import number_text

FIRST_FREE_SEED = 100


@dataclass(frozen=True)
class Column:
    """Heading of a metric, and the factor its values are multiplied by."""

    title: str
    factor: float = 1.0


def arm_table(
    results: Results, study: str, columns: Mapping[str, Column], arms: Mapping[str, str] | None = None
) -> str:
    """Rows in the order of `arms` (name -> label; default all arms by name); arms without records are left out.

    A cell is `mean ± half width` of the 95 % t interval over seeds below 100; a metric that some seed lacks shows over
    how many seeds it is. Raises `MissingRecords` for a study without any record.
    """
    known = results.arms(study)
    labels = {arm: label for arm, label in (arms or {arm: arm for arm in known}).items() if arm in known}
    head = ["arm", "seeds", *(column.title for column in columns.values())]
    lines = [_line(head), _line(["---"] + ["---:"] * (len(head) - 1))]
    for arm, label in labels.items():
        seeds = {seed: s for seed, s in results.summary(study, arm).items() if seed < FIRST_FREE_SEED}
        cells = [_cell([s.get(metric) for s in seeds.values()], column) for metric, column in columns.items()]
        lines.append(_line([label, str(len(seeds)), *cells]))
    return "\n".join(lines)


def _cell(values: list[float | None], column: Column) -> str:
    present = [column.factor * value for value in values if value is not None and math.isfinite(value)]
    if not present:
        return "-"
    estimate = paired_t(present)
    text = number_text(estimate.effect)
    if estimate.high is not None and estimate.effect is not None:
        text += f" ± {number_text(estimate.high - estimate.effect)}"
    return text if len(present) == len(values) else f"{text} ({len(present)} of {len(values)})"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
