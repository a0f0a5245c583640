"""Floating-point operations and hours of an RL run, from sizes and stated assumptions. Standard library only.

    step = step_work(full("7b"), counts, Assumptions(mfu=0.35))
    step.hours(1000)

A sequence of s tokens costs 2 N s + 2 L n d s^2 in a forward pass (N: `Counts.multiplied`, L layers, n heads of size d;
causal attention, so half of the scores), and twice that in the backward pass: per token 6 N and an attention term.
Generating a sequence costs a forward pass, prompt included. Recomputation is not counted, as is usual for the model
FLOPs of an MFU (Chowdhery et al., arXiv:2204.02311, appendix B; theirs counts all scores).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from shared.dryrun.count import Counts
from shared.experiment.contracts import AssayError
from shared.megatron.config import ModelConfig
from shared.rl.full import FullRL

DEFAULT_ROLLOUT_MFU = 0.05
UNITS = {
    "gpu_tflops": "dense bfloat16 TFLOP/s of one GPU",
    "gpu_gib": "GiB of one GPU",
    "mean_prompt": "tokens of an average prompt",
    "mean_response": "tokens of an average response",
    "rollout_speed": "tokens per second and GPU",
    "disk_gbs": "GB per second",
}


class BadAssumption(AssayError):
    """An assumption that no run can meet."""


@dataclass(frozen=True)
class Assumptions:
    """What nobody has measured here: replace it with your numbers. Raises `BadAssumption`.

    mfu: model FLOPs per second of the training ranks, as a share of their peak.
    gpu_tflops: dense bfloat16 TFLOP/s of one GPU; the default is an H100 SXM's by its data sheet.
    gpu_gib: usable memory of one GPU; the default is that of an 80 GB H100.
    mean_prompt, mean_response: tokens of an average sequence.
    rollout_speed: generated tokens per second and GPU; None is what an MFU of 5 % gives.
    disk_gbs: GB per second at which all ranks together write a checkpoint.
    """

    mfu: float = 0.35
    gpu_tflops: float = 989.0
    gpu_gib: float = 79.0
    mean_prompt: int = 256
    mean_response: int = 8192
    rollout_speed: float | None = None
    disk_gbs: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.mfu <= 1:
            raise BadAssumption(f"mfu={self.mfu:g} is no share of the peak: choose more than 0 and at most 1")
        for name, unit in UNITS.items():
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise BadAssumption(f"{name}={value:g} is out of range: give {unit}, more than 0")

    @property
    def peak_flops(self) -> float:
        """FLOPs per second of one GPU."""
        return self.gpu_tflops * 1e12


@dataclass(frozen=True)
class StepWork:
    """One RL step: generate, score the kept responses under the old policy, update. Sequences of equal length.

    Tokens are those of responses; FLOPs are of the whole cluster.
    """

    response: int
    generated_tokens: int
    trained_tokens: int
    rollout_flops: float
    score_flops: float
    update_flops: float
    rollout_speed: float
    rollout_seconds: float
    train_seconds: float

    @property
    def seconds(self) -> float:
        """Generation and training take turns."""
        return self.rollout_seconds + self.train_seconds

    def hours(self, steps: int) -> float:
        return steps * self.seconds / 3600


def step_work(full: FullRL, counts: Counts, assumed: Assumptions, response: int | None = None) -> StepWork:
    """Work of one step with responses of `response` tokens, by default the assumed mean. Raises `BadAssumption`."""
    response = response or assumed.mean_response
    if response > full.max_response_tokens:
        raise BadAssumption(f"mean_response={response} is above the limit of {full.max_response_tokens}: choose less")
    if assumed.mean_prompt > full.max_prompt_tokens:
        raise BadAssumption(
            f"mean_prompt={assumed.mean_prompt} is above the limit of {full.max_prompt_tokens}: choose less"
        )
    forward = forward_flops(full.architecture, counts, assumed.mean_prompt + response)
    generated, trained = full.gen_prompts * full.samples, full.train_prompts * full.samples
    speed = assumed.rollout_speed or DEFAULT_ROLLOUT_MFU * assumed.peak_flops / (forward / response)
    train_flops = trained * forward * 4
    return StepWork(
        response=response,
        generated_tokens=generated * response,
        trained_tokens=trained * response,
        rollout_flops=generated * forward,
        score_flops=trained * forward,
        update_flops=trained * forward * 3,
        rollout_speed=speed,
        rollout_seconds=generated * response / (speed * full.rollout_nodes * full.cluster.gpus_per_node),
        train_seconds=train_flops / (full.layout.world_size * assumed.peak_flops * assumed.mfu),
    )


def forward_flops(model: ModelConfig, counts: Counts, tokens: int) -> float:
    """FLOPs of a forward pass over one sequence of `tokens` tokens."""
    attention = 2.0 * model.num_layers * model.num_attention_heads * model.head_dim * tokens**2
    return 2.0 * counts.multiplied * tokens + attention
