"""Everything that decides an RL run, in one frozen dataclass; printed whole into its record."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from shared.data.tasks.base import Task
from shared.experiment.contracts import AssayError
from shared.megatron.model import ModelConfig
from shared.rl.losses import PolicyLoss
from shared.rl.pipeline import Terms


class BadRLConfig(AssayError):
    """A setting of an RL run that nothing can be trained with."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW in one or two groups. `head_lr=None` gives one learning rate to all weights.

    A head learning rate needs an untied head: the head starts as a copy of the embedding. The learning rates rise
    linearly over the updates of the first `warmup_rollouts` rollouts, then stay. `grad_clip` bounds the norm of the
    whole gradient; 0 switches clipping off.
    """

    body_lr: float
    head_lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_rollouts: int = 10
    grad_clip: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("body_lr", self.body_lr), ("head_lr", self.head_lr)):
            if value is not None and value <= 0:
                raise BadRLConfig(f"{name}={value}: learning rates are positive; head_lr=None gives one to all weights")
        if self.grad_clip < 0:
            raise BadRLConfig(f"grad_clip={self.grad_clip} is negative: choose a bound, or 0 for none")


@dataclass(frozen=True)
class RLConfig:
    """One arm of an RL run on a generated task.

    policy: name of the artifact with the warm-started weights. untie_head: give the policy its own output head.
    pool: problems drawn once from the task's "rl" split, of which each rollout takes `gen_prompts`.
    prompts x samples responses are trained on per rollout, in `epochs` passes of `minibatches` updates each; the kept
    groups are dealt out evenly, so dynamic sampling does not change the number of updates while it keeps at least
    `minibatches` groups.
    temperature: of sampling, and of the log-probabilities that are trained.
    reward_correct, reward_wrong: outcome rewards. The positive-example term knows a correct response by reward 1.0.
    early: first and last rollout of the window behind `entropy_early`.
    dynamic_sampling: "off" keeps all groups; "drop" removes those with equal accuracy; `max_gen_batches` > 1 samples
    again until `prompts` groups are kept or that many batches were generated (DAPO); 1 never refills (Klear family).
    eps_low, eps_high: the range that the clip metrics count by; the rule under test has its own fields.
    matched_reward: training reward (pass rate) at which arms are compared at equal reward.
    eval_every: rollouts between evaluations on held-out problems; the last rollout is always evaluated.
    checkpoint_every: rollouts between checkpoints.
    """

    loss: PolicyLoss
    task: Task
    model: ModelConfig
    policy: str
    optimizer: OptimizerConfig
    untie_head: bool = False
    terms: Terms = field(default_factory=Terms)
    prompts: int = 64
    samples: int = 8
    gen_prompts: int = 64
    max_gen_batches: int = 1
    dynamic_sampling: Literal["off", "drop"] = "drop"
    pool: int = 4000
    rollouts: int = 80
    minibatches: int = 8
    epochs: int = 1
    temperature: float = 1.0
    reward_correct: float = 1.0
    reward_wrong: float = -1.0
    scale_by_std: bool = True
    eps_low: float = 0.2
    eps_high: float = 0.2
    matched_reward: float = 0.6
    early: tuple[int, int] = (5, 24)
    eval_every: int = 40
    eval_problems: int = 128
    eval_samples: int = 8
    checkpoint_every: int = 10
