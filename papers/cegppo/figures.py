"""Figures and tables of the README, all computed from records."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from papers.cegppo.claims import KEY
from shared.experiment.arm_table import FIRST_FREE_SEED, Column, arm_table
from shared.experiment.claims import ClaimResult, evaluate
from shared.experiment.markdown import claims_table
from shared.experiment.plots import PALETTE, curves, figure, forest, heatmap
from shared.experiment.results import MissingRecords, Results
from shared.experiment.statistics import paired_t
from shared.experiment.wording import number_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELS = {
    "ce_0_1": "CE(0, 1)",
    "dapo": "DAPO",
    "ce_0.5_1": "CE(0.5, 1)",
    "ce_0.75_1": "CE(0.75, 1)",
    "grpo": "GRPO",
    "ce_1_1": "CE(1, 1)",
    "gppo": "GPPO 0.2/0.28",
    "ce_1_0.5": "CE(1, 0.5)",
    "ce_1_0": "CE(1, 0)",
    "cispo": "CISPO",
    "no_clip": "no clipping",
    "bonus_0.001": "GRPO + bonus 0.001",
    "bonus_0.003": "GRPO + bonus 0.003",
    "grpo_sft_0.1": "GRPO + SFT 0.1",
    "ce_0.5_1_sft_0.1": "CE(0.5, 1) + SFT 0.1",
}
SHOWN = ("ce_0_1", "dapo", "ce_0.5_1", "grpo", "ce_1_1", "ce_1_0")

CLIP = {
    "clip_low": Column("clipped low, %", 100),
    "clip_high": Column("clipped high, %", 100),
    "lp_low": Column("LP share low"),
    "lp_high": Column("LP share high"),
    "positive_share": Column("A > 0"),
}
ENTROPY = {
    "entropy_start": Column("entropy, start"),
    "entropy_mean": Column("mean"),
    "entropy_end": Column("end"),
}
OUTCOME = {
    "entropy_at_reward": Column("at matched reward"),
    "reward_end": Column("reward, end"),
    "final_pass@1": Column("pass@1"),
    "final_pass@8": Column("pass@8"),
}
SHARE = "lp_high_tokens"
ZIPF = ("zipf_0", "zipf_1", "zipf_1.5", "base", "zipf_2.5", "zipf_3")
CONTRASTS = {
    "dapo_minus_grpo": "DAPO - GRPO",
    "beta1_0_to_1": "beta1: CE(1,1) - CE(0,1)",
    "beta2_at_beta1_1": "beta2: CE(1,1) - CE(1,0)",
    "beta2_at_beta1_0": "beta2: CE(0,1) - GRPO",
}


def tabular_table(results: Results) -> str:
    """All arms of regime T."""
    columns = ENTROPY | {
        "free_entropy_at_reward": Column("free tokens at matched reward"),
        "rollouts_to_reward": Column("rollouts to reward 0.9"),
        "reward_end": Column("true reward, end"),
    }
    return arm_table(results, "tabular", columns | CLIP, LABELS)


def neural_table(study: str):
    """Table function for the GPTModel studies."""

    def table(results: Results) -> str:
        return arm_table(results, study, ENTROPY | OUTCOME | CLIP, LABELS)

    return table


def context_table(results: Results) -> str:
    """What stands beside every statement on entropy: how much was clipped, how improbable it was, sign and reward."""
    parts = []
    for study, regime in (
        ("tabular", "T"),
        ("full", "H"),
        ("uniform", "U"),
        ("reuse", "H, 4 x 4"),
        ("plain", "plain, 4 x 4"),
    ):
        if study in results.studies():
            labels = {arm: f"{regime}: {LABELS[arm]}" for arm in ("grpo", "ce_0.5_1", "ce_1_1")}
            parts.append(arm_table(results, study, CLIP | {"reward_end": Column("reward, end")}, labels))
    if not parts:
        raise MissingRecords("no study has records yet: run or promote one")
    head, *rest = parts
    return "\n".join([head, *("\n".join(part.splitlines()[2:]) for part in rest)])


def mechanism_table(results: Results) -> str:
    """Branch sums against finite differences."""
    columns = {
        "first_order_low_per_rollout": Column("low branch, first order", 1e3),
        "finite_difference_low_per_rollout": Column("finite difference", 1e3),
        "first_order_high_per_rollout": Column("high branch, first order", 1e3),
        "finite_difference_high_per_rollout": Column("finite difference", 1e3),
        "rollouts": Column("rollouts"),
    }
    return arm_table(results, "mechanism", columns | CLIP | {"reward": Column("reward")})


def paired_table(results: Results) -> str:
    """Differences between rules in one rollout, 1e-3 nats."""
    columns = {f"diff_{name}": Column(title, 1e3) for name, title in CONTRASTS.items()}
    return arm_table(results, "paired", columns | CLIP | {"reward": Column("reward")})


def map_table(results: Results) -> str:
    """All cells of the regime map, with the rank correlation that the figure shows."""
    columns = {"entropy_start": Column("start entropy")} | {k: Column(v) for k, v in CONTRASTS.items()}
    columns |= {"lp_high_tokens": Column("LP share high, by tokens")}
    table = arm_table(results, "map", columns | CLIP | {"reward_end": Column("true reward, end")})
    return f"{table}\n\n{correlation_text(results)}"


def correlation_text(results: Results) -> str:
    """Spearman's rank correlation over cells between the LP share of clipped positive tokens and each effect.

    Descriptive: it has no interval and no verdict.
    """
    from scipy.stats import spearmanr

    cells = [cell for cell in results.arms("map") if _share(results, cell) is not None]
    if len(cells) < 5:
        return f"Rank correlations need 5 cells or more; {len(cells)} are here."
    share = [_share(results, cell) for cell in cells]
    parts = []
    for name in ("beta2_at_beta1_1", "beta2_at_beta1_0", "dapo_minus_grpo", "beta1_0_to_1"):
        found: Any = spearmanr(share, [_mean(results, cell, name) for cell in cells])
        parts.append(f"{CONTRASTS[name]} {number_text(float(found.statistic))}")
    head = f"Spearman correlation with the LP share of clipped positive tokens over {len(cells)} cells"
    return f"{head} (descriptive, no verdict): {'; '.join(parts)}."


def _share(results: Results, cell: str) -> float | None:
    """LP share of a cell, if every seed has clipped tokens."""
    seeds = [seed for seed in results.seeds("map", cell) if seed < FIRST_FREE_SEED]
    return _mean(results, cell, SHARE) if len(_values(results, cell, SHARE)) == len(seeds) else None


def _values(results: Results, cell: str, metric: str) -> list[float]:
    seeds = results.summary("map", cell).items()
    return [s[metric] for seed, s in seeds if seed < FIRST_FREE_SEED and s.get(metric) is not None]


def _mean(results: Results, cell: str, metric: str) -> float | None:
    values = _values(results, cell, metric)
    return sum(values) / len(values) if values else None


def map_figure(results: Results) -> Figure:
    """One point per cell: an effect on end entropy against the LP share of clipped positive tokens under GRPO."""
    made, axes = figure(columns=2, height=3.8)
    _scatter(axes[0], results, "beta2_at_beta1_1", "effect of beta2, CE(1,1) - CE(1,0), nats")
    _scatter(axes[1], results, "dapo_minus_grpo", "effect of clip-higher, DAPO - GRPO, nats")
    return made


def _scatter(axis: Axes, results: Results, metric: str, title: str) -> None:
    axis.axhline(0, color="#444444", linewidth=1)
    series = [cell for cell in ZIPF if cell in results.arms("map") and _share(results, cell) is not None]
    places = [(_share(results, cell), _mean(results, cell, metric)) for cell in series]
    axis.plot(*zip(*places, strict=True), color="#CC79A7", linewidth=1.2, zorder=1)
    for cell in results.arms("map"):
        share, effects = _share(results, cell), _values(results, cell, metric)
        if share is None or len(effects) < 2:
            continue
        estimate = paired_t(effects)
        mean, high = estimate.effect or 0.0, estimate.high or 0.0
        named = cell in ("base", "zipf_0", "zipf_1", "zipf_1.5", "verifier_exact", "minibatches_16", "sgd_lr_10")
        half = high - mean
        colour = "#999999" if abs(mean) <= half else PALETTE[0] if mean > 0 else PALETTE[1]
        axis.errorbar([share], [mean], yerr=[half], fmt="o", color=colour, markersize=5, linewidth=1.2)
        if named:
            axis.annotate(cell, (share, mean), xytext=(5, 5), textcoords="offset points", fontsize=8, color="#444444")
    axis.set_title(title, loc="left")
    axis.set_xlabel("improbable share of clipped A > 0 tokens (GRPO)")


def paired_figure(results: Results) -> Figure:
    """Entropy change of one rollout per rule, relative to GRPO, for every checkpoint."""
    points = [arm for arm in ("H_12", "H_30", "H_60", "U_12", "U_40") if arm in results.arms("paired")]
    rules = [*SHOWN[:3], "ce_0.75_1", "ce_1_1", "no_clip", "ce_1_0.5", "ce_1_0"]
    made, (axis,) = figure(height=0.6 + 0.42 * len(points))
    values: list[list[float | None]] = []
    for arm in points:
        seeds = [s for seed, s in results.summary("paired", arm).items() if seed < FIRST_FREE_SEED]
        values.append([1e3 * sum(s[f"change_{r}"] - s["change_grpo"] for s in seeds) / len(seeds) for r in rules])
    heatmap(axis, values, points, [LABELS[rule] for rule in rules])
    axis.tick_params(axis="x", labelsize=8)
    axis.set_title("entropy after one rollout minus GRPO's, 1e-3 nats", loc="left")
    return made


def entropy_figure(study: str, metrics: dict[str, str]):
    """Curves of the arms whose order the paper predicts."""

    def draw(results: Results) -> Any:
        present = {arm: LABELS[arm] for arm in SHOWN if arm in results.arms(study)}
        if not present:
            raise MissingRecords(f"study {study} has none of the arms {', '.join(SHOWN)} yet: run or promote them")
        return curves(results, study, metrics, present, x_label="rollout")

    return draw


def key_claims(results: Results) -> list[ClaimResult]:
    """The claims of the summary, judged."""
    from papers.cegppo.experiment import EXPERIMENT

    judged = {claim.id: claim for claim in EXPERIMENT.claims}
    return [evaluate(EXPERIMENT, judged[id], results) for id in KEY]


TABLES = {
    "key": lambda results: claims_table(key_claims(results)),
    "context": context_table,
    "mechanism": mechanism_table,
    "tabular": tabular_table,
    "map": map_table,
    "paired": paired_table,
    "full": neural_table("full"),
    "uniform": neural_table("uniform"),
    "reuse": neural_table("reuse"),
    "plain": neural_table("plain"),
}
FIGURES = {
    "claims": lambda results: forest(key_claims(results)),
    "entropy_T": entropy_figure("tabular", {"entropy": "T: entropy, nats per token", "true_reward": "T: true reward"}),
    "entropy_H": entropy_figure("full", {"entropy": "H: entropy, nats per token", "reward": "H: pass rate"}),
    "reuse": entropy_figure("reuse", {"entropy": "H, 4 epochs x 4: entropy", "reward": "pass rate"}),
    "plain": entropy_figure("plain", {"entropy": "plain Countdown, 4 epochs x 4: entropy", "reward": "pass rate"}),
    "map": map_figure,
    "paired": paired_figure,
}
