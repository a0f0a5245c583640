"""Where an entropy effect holds: the same rules in many variants of regime T, one run per (variant, seed)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from shared.experiment.contracts import Interrupted, RunContext
from shared.rl.losses import PolicyLoss
from shared.rl.summary import BRANCH_METRICS, lp_by_tokens, window_mean
from shared.rl.tabular import TabularBandit, TabularConfig, rollout_row


@dataclass(frozen=True)
class CellConfig:
    """world: the variant (its `loss` is not used). rules: name -> (loss, eps_high that the metrics count by).

    contrasts: name -> {rule: coefficient} over the end entropies. Branch metrics are reported of `reference`.
    """

    world: TabularConfig
    rules: Mapping[str, tuple[PolicyLoss, float]]
    contrasts: Mapping[str, Mapping[str, float]]
    reference: str


def run_cell(run: RunContext) -> dict[str, Any]:
    """Run function: one row per rule (the rule's index is the step), all from the same start and uniforms."""
    config: CellConfig = run.config
    run.rewind(-1)
    end: dict[str, float] = {}
    summary: dict[str, Any] = {}
    for index, (name, (loss, eps_high)) in enumerate(config.rules.items()):
        world = TabularBandit(replace(config.world, loss=loss, eps_high=eps_high), run.seed)
        rows = [{"step": float(k), **rollout_row(world, k)} for k in range(config.world.rollouts)]
        last = config.world.rollouts - 1
        end[name] = window_mean(rows, "entropy", last - 4, last) or 0.0
        measured = {key: window_mean(rows, key, 0, last) for key in BRANCH_METRICS}
        run.log(
            index,
            entropy_start=rows[0]["entropy"],
            entropy_end=end[name],
            **{key: value for key, value in measured.items() if value is not None},
        )
        if name == config.reference:
            summary |= measured | lp_by_tokens(rows)
            summary |= {
                "entropy_start": rows[0]["entropy"],
                "reward_end": window_mean(rows, "true_reward", last - 4, last),
            }
        run.progress(index + 1, len(config.rules))
        if run.stop_requested() and index + 1 < len(config.rules):
            raise Interrupted(f"stopped after rule {name}")
    for name, weights in config.contrasts.items():
        summary[name] = sum(weight * end[rule] for rule, weight in weights.items())
    return summary | {f"entropy_end_{name}": value for name, value in end.items()}
