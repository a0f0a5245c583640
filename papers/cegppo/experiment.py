"""CE-GPPO at proxy scale: regimes T (tabular), H (Countdown, fast head), U (one learning rate) and plain Countdown.

    python -m papers run cegppo                   # the headline set
    python -m papers run cegppo --all             # the grid behind the committed table
    python -m papers run cegppo --study full --arm grpo --seed 3

Judged seeds are 0, 1, 2, ...; whatever was tried or chosen used seeds >= 100.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from papers.cegppo.claims import CLAIMS
from papers.cegppo.figures import FIGURES, TABLES
from papers.cegppo.method import ce_gppo_loss
from papers.klear_gppo.method import gppo_loss
from shared.experiment.contracts import Artifact, Experiment, Grid, RunContext, Study
from shared.rl.bench import plain_bench, plain_sft, regime_h, regime_u, styled_sft
from shared.rl.config import OptimizerConfig
from shared.rl.inputs import LossInputs, TokenLoss
from shared.rl.losses import CISPO, NoClip, PolicyLoss, PPOClip, policy_loss
from shared.rl.paired import MechanismConfig, PairedConfig, mechanism_run, paired_test
from shared.rl.pipeline import Terms
from shared.rl.ranks import FOLLOWS
from shared.rl.regime_map import CellConfig, run_cell
from shared.rl.replay import replay
from shared.rl.tabular import TabularConfig, tabular_mechanism, train_tabular
from shared.rl.trainer import train_rl
from shared.training.sft import build_sft_policy


@policy_loss("ce_gppo")
@dataclass(frozen=True)
class CEGPPO:
    """papers/cegppo/method.py behind the pipeline's contract; field names are the paper's."""

    beta1: float = 0.5
    beta2: float = 1.0
    eps_low: float = 0.2
    eps_high: float = 0.2
    clip_ratio_c: float = 10.0

    def per_token(self, inputs: LossInputs) -> TokenLoss:
        out = ce_gppo_loss(
            inputs.logp_BT,
            inputs.logp_old_BT,
            inputs.advantages_BT,
            beta1=self.beta1,
            beta2=self.beta2,
            eps_low=self.eps_low,
            eps_high=self.eps_high,
            clip_ratio_c=self.clip_ratio_c,
        )
        return TokenLoss(out.loss_BT, out.weight_BT)


@policy_loss("gppo")
@dataclass(frozen=True)
class GPPO:
    """papers/klear_gppo/method.py behind the pipeline's contract."""

    eps_low: float = 0.2
    eps_high: float = 0.28
    clip_ratio_c: float = 10.0

    def per_token(self, inputs: LossInputs) -> TokenLoss:
        out = gppo_loss(
            inputs.logp_BT,
            inputs.logp_old_BT,
            inputs.advantages_BT,
            eps_low=self.eps_low,
            eps_high=self.eps_high,
            clip_ratio_c=self.clip_ratio_c,
        )
        return TokenLoss(out.loss_BT, out.weight_BT)


C = 10.0
"""Dual-clip bound of the released scripts, for every rule that has one."""

RULES: dict[str, tuple[PolicyLoss, float]] = {
    "grpo": (PPOClip(0.2, 0.2, C), 0.2),
    "dapo": (PPOClip(0.2, 0.28, C), 0.28),
    "cispo": (CISPO(0.2, 0.2), 0.2),
    "gppo": (GPPO(0.2, 0.28, C), 0.28),
    "ce_0.5_1": (CEGPPO(0.5, 1.0), 0.2),
    "ce_0.75_1": (CEGPPO(0.75, 1.0), 0.2),
    "ce_1_1": (CEGPPO(1.0, 1.0), 0.2),
    "ce_1_0.5": (CEGPPO(1.0, 0.5), 0.2),
    "ce_0_1": (CEGPPO(0.0, 1.0), 0.2),
    "ce_1_0": (CEGPPO(1.0, 0.0), 0.2),
    "no_clip": (NoClip(C), 0.2),
}
"""Arm -> (loss, upper clip range that its metrics count by)."""

BONUS = {"bonus_0.001": 0.001, "bonus_0.003": 0.003}
"""Arm -> entropy bonus added to GRPO: the two coefficients that a public note on the paper reports."""

ORDER = ("ce_0_1", "dapo", "ce_0.5_1", "grpo", "ce_1_1", "ce_1_0")
REUSE = ("grpo", "dapo", "no_clip", "ce_0_1", "ce_0.5_1", "ce_1_1", "ce_1_0")
PAIRED = ("grpo", "dapo", "ce_0_1", "ce_0.5_1", "ce_0.75_1", "ce_1_1", "ce_1_0.5", "ce_1_0", "no_clip")

CONTRASTS = {
    "dapo_minus_grpo": {"dapo": 1.0, "grpo": -1.0},
    "beta1_0_to_1": {"ce_1_1": 1.0, "ce_0_1": -1.0},
    "beta2_at_beta1_1": {"ce_1_1": 1.0, "ce_1_0": -1.0},
    "beta2_at_beta1_0": {"ce_0_1": 1.0, "grpo": -1.0},
}


def tabular_arms() -> dict[str, TabularConfig]:
    """All rules and both bonuses in regime T."""
    arms = {name: TabularConfig(loss=loss, eps_high=eps_high) for name, (loss, eps_high) in RULES.items()}
    grpo = arms["grpo"]
    return arms | {name: replace(grpo, entropy_coef=coef) for name, coef in BONUS.items()}


def full_arms() -> dict[str, Any]:
    """All rules, both bonuses and the positive-example term in regime H."""
    arms = {name: regime_h(loss, eps_high=eps_high) for name, (loss, eps_high) in RULES.items()}
    for name, coef in BONUS.items():
        arms[name] = regime_h(RULES["grpo"][0], terms=Terms(entropy_coef=coef))
    for name in ("grpo", "ce_0.5_1"):
        arms[f"{name}_sft_0.1"] = regime_h(RULES[name][0], terms=Terms(positive_coef=0.1))
    return arms


def reuse_arms() -> dict[str, Any]:
    """Regime H with token re-use: 4 epochs x 4 mini-batches per rollout."""
    base = {name: regime_h(RULES[name][0], eps_high=RULES[name][1]) for name in REUSE}
    return {name: replace(arm, epochs=4, minibatches=4, rollouts=40, eval_every=40) for name, arm in base.items()}


MAP_WORLD = TabularConfig(loss=RULES["grpo"][0], groups=64)


def map_cells() -> dict[str, CellConfig]:
    """Variants of regime T: start entropy, learning rate, mini-batches, verifier, optimiser, sizes."""
    rules = {name: RULES[name] for name in ("grpo", "dapo", "ce_0_1", "ce_1_1", "ce_1_0")}
    variants: dict[str, dict[str, Any]] = {
        "base": {},
        **{f"zipf_{z:g}": {"zipf": z} for z in (0.0, 1.0, 1.5, 2.5, 3.0)},
        **{f"lr_{lr:g}": {"lr": lr} for lr in (0.03, 0.05, 0.2)},
        **{f"minibatches_{k}": {"minibatches": k} for k in (4, 16)},
        "verifier_0.9": {"p_true": 0.9, "p_false": 0.1},
        "verifier_exact": {"p_true": 1.0, "p_false": 0.0},
        "verifier_coin": {"p_true": 0.5, "p_false": 0.5},
        "sgd_lr_3": {"optimizer": "sgd", "lr": 3.0},
        "sgd_lr_10": {"optimizer": "sgd", "lr": 10.0},
        "decisions_8": {"decisions": 8},
        "vocabulary_128": {"vocabulary": 128},
        "samples_16": {"samples": 16},
    }
    return {
        name: CellConfig(world=replace(MAP_WORLD, **fields), rules=rules, contrasts=CONTRASTS, reference="grpo")
        for name, fields in variants.items()
    }


def mechanism_arms() -> dict[str, Any]:
    """Branch sums under GRPO in T, and in H and U early (just after the warm-up of 10 rollouts) and late."""
    h, u = regime_h(RULES["grpo"][0]), regime_u(RULES["grpo"][0])
    return {
        "T": TabularConfig(loss=RULES["grpo"][0]),
        "H_12": MechanismConfig(base=h, rollouts_before=12, probes=8),
        "H_40": MechanismConfig(base=h, rollouts_before=40, probes=8),
        "U_12": MechanismConfig(base=u, rollouts_before=12, probes=8),
        "U_40": MechanismConfig(base=u, rollouts_before=40, probes=8),
    }


def run_mechanism(run: RunContext) -> dict[str, Any]:
    """Regime T observes a whole run, H and U a trained policy's next rollouts."""
    return tabular_mechanism(run) if isinstance(run.config, TabularConfig) else mechanism_run(run)


def paired_arms() -> dict[str, PairedConfig]:
    """Paired one-rollout tests early, middle and late in H and U; the policy is trained with GRPO before."""
    rules = {name: {"loss": RULES[name][0], "eps_high": RULES[name][1]} for name in PAIRED}
    bases = {"H": regime_h(RULES["grpo"][0]), "U": regime_u(RULES["grpo"][0])}
    points = [("H", 12), ("H", 30), ("H", 60), ("U", 12), ("U", 40)]
    return {
        f"{regime}_{before}": PairedConfig(
            base=bases[regime], rollouts_before=before, probes=10, rules=rules, contrasts=CONTRASTS
        )
        for regime, before in points
    }


def uniform_arms() -> dict[str, Any]:
    """Full runs in regime U: the arms whose order the paper predicts."""
    return {name: regime_u(RULES[name][0]) for name in ("grpo", "ce_0_1", "ce_1_1", "ce_1_0")}


def plain_arms() -> dict[str, Any]:
    """The plain Countdown bench with token re-use."""
    return {name: plain_bench(RULES[name][0], eps_high=RULES[name][1]) for name in REUSE}


FIVE = tuple(range(5))
EIGHT = tuple(range(8))
TWENTY = tuple(range(20))
TINY_RL = {
    "rollouts": 2,
    "prompts": 8,
    "gen_prompts": 8,
    "eval_problems": 8,
    "pool": 64,
    "eval_every": 2,
    # An untrained policy solves nothing; without this every group would be dropped and no update made.
    "dynamic_sampling": "off",
}
TINY_PAIRED = {f"base.{name}": value for name, value in TINY_RL.items()} | {
    "rollouts_before": 1,
    "probes": 1,
    "probe_prompts": 8,
}
REPLAY_OPTIMIZER = OptimizerConfig(body_lr=3e-4, head_lr=3e-3, warmup_rollouts=0)
"""Steps large enough that the stored rollouts are clipped on both sides."""
TINY_REPLAY = {"rollouts": 20, "prompts": 8, "minibatches": 4}

CURVES = ("entropy", "reward", "clip_low", "clip_high", "lp_high", "positive_share")

STUDIES = (
    Study(
        name="mechanism",
        question="Do clipped tokens push entropy the way the paper says, and are they improbable?",
        arms=mechanism_arms(),
        run=run_mechanism,
        scales={"smoke": Grid((0,), arms=("T",), overrides={"rollouts": 4, "groups": 16}), "proxy": Grid(FIVE)},
        headline=Grid(FIVE, arms=("T", "H_12")),
        artifacts=("styled_sft",),
        cost_cpu_s=10,
        canary="T",
        curves=("first_order_low", "first_order_high"),
    ),
    Study(
        name="tabular",
        question="Regime T: which rule keeps entropy, at matched step and at matched reward?",
        arms=tabular_arms(),
        run=train_tabular,
        scales={
            "smoke": Grid((0,), arms=("grpo", "ce_0.5_1"), overrides={"rollouts": 20, "groups": 16}),
            "proxy": Grid(TWENTY),
        },
        headline=Grid(TWENTY, arms=tuple(arm for arm in tabular_arms() if arm not in ("gppo", "no_clip"))),
        cost_cpu_s=0.9,
        canary="ce_0.5_1",
        curves=("entropy", "true_reward", "clip_low", "clip_high", "lp_high"),
    ),
    Study(
        name="map",
        question="Where in the neighbourhood of T do the effects hold, vanish or flip?",
        arms=map_cells(),
        run=run_cell,
        scales={
            "canary": Grid((0,), arms=("base",), overrides={"world": replace(MAP_WORLD, rollouts=4, groups=16)}),
            "proxy": Grid(EIGHT),
        },
        headline=Grid(EIGHT, arms=("base", "zipf_0", "lr_0.03", "verifier_exact")),
        cost_cpu_s=3,
        canary="base",
        curves=("entropy_start", "entropy_end"),
    ),
    Study(
        name="paired",
        question="From one policy, optimiser state and rollout: what does each rule do to entropy?",
        arms=paired_arms(),
        run=paired_test,
        scales={"smoke": Grid((0,), arms=("H_12",), overrides=TINY_PAIRED), "proxy": Grid(FIVE)},
        artifacts=("styled_sft",),
        cost_cpu_s=40,
        curves=tuple(f"diff_{name}" for name in CONTRASTS),
    ),
    Study(
        name="full",
        question="Regime H: entropy, reward and held-out accuracy over 80 rollouts",
        arms=full_arms(),
        run=train_rl,
        scales={"smoke": Grid((0,), arms=("grpo", "ce_0.5_1"), overrides=TINY_RL), "proxy": Grid(FIVE)},
        headline=Grid(FIVE, arms=ORDER),
        artifacts=("styled_sft",),
        cost_cpu_s=40,
        curves=CURVES,
        parallel=FOLLOWS,
    ),
    Study(
        name="uniform",
        question="Regime U: what is left of the order when all weights share one learning rate?",
        arms=uniform_arms(),
        run=train_rl,
        scales={"proxy": Grid(FIVE)},
        artifacts=("styled_sft",),
        cost_cpu_s=40,
        curves=CURVES,
        parallel=FOLLOWS,
    ),
    Study(
        name="reuse",
        question="Regime H with 4 epochs x 4 mini-batches: which rule stays stable?",
        arms=reuse_arms(),
        run=train_rl,
        scales={"proxy": Grid(FIVE)},
        artifacts=("styled_sft",),
        cost_cpu_s=40,
        curves=CURVES,
        parallel=FOLLOWS,
    ),
    Study(
        name="plain",
        question="Plain Countdown with token re-use: where CE-GPPO was seen to wreck learning",
        arms=plain_arms(),
        run=train_rl,
        scales={"proxy": Grid(FIVE)},
        artifacts=("plain_sft",),
        cost_cpu_s=130,
        curves=CURVES,
        parallel=FOLLOWS,
    ),
    Study(
        name="replay",
        question="Canary: the learner on stored rollouts from a seeded model",
        arms={"ce_0.5_1": replace(regime_h(RULES["ce_0.5_1"][0]), optimizer=REPLAY_OPTIMIZER)},
        run=replay,
        scales={"smoke": Grid((0,), arms=("ce_0.5_1",), overrides=TINY_REPLAY)},
        cost_cpu_s=1,
        canary="ce_0.5_1",
    ),
)

EXPERIMENT = Experiment(
    paper="cegppo",
    artifacts=(
        Artifact(
            name="styled_sft",
            build=build_sft_policy,
            config=styled_sft(),
            overrides={"smoke": {"steps": 20, "pool": 500, "eval_problems": 8}},
            cost_cpu_s=150,
        ),
        Artifact(name="plain_sft", build=build_sft_policy, config=plain_sft(), cost_cpu_s=150),
    ),
    studies=STUDIES,
    claims=CLAIMS,
    tables=TABLES,
    figures=FIGURES,
)
