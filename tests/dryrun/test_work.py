"""FLOPs and hours against numbers worked out by hand, and against an operator-level count of a real forward pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from papers.cegppo.full import full
from shared.dryrun.count import Counts
from shared.dryrun.work import Assumptions, forward_flops, step_work
from shared.megatron.config import ModelConfig
from shared.megatron.model import build_model, forward_logits
from tests.dryrun.test_memory import QWEN2

SEVEN_B = Counts(total=7_615_616_512, active=7_615_616_512, multiplied=7_070_285_824, stages=())


def multiplied(model: ModelConfig) -> int:
    h, d = model.hidden_size, model.head_dim
    layer = 2 * h * d * (model.num_attention_heads + model.num_query_groups) + 3 * h * model.ffn_hidden_size
    return model.num_layers * layer + model.vocab_size * h


def test_forward_flops_are_what_torch_counts() -> None:
    """torch counts matrix products, and attention over all pairs of positions: twice the causal half."""
    model, tokens = QWEN2, 64
    built = build_model(model, seed=0, device="cpu")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        forward_logits(built, torch.zeros(1, tokens, dtype=torch.int64))
    counts = Counts(0, 0, multiplied(model), ())
    linear = 2 * counts.multiplied * tokens
    attention = forward_flops(model, counts, tokens) - linear
    assert counter.get_total_flops() in (
        linear,
        linear + 2 * attention,
    )  # its CPU attention kernel may be unknown to it
    assert attention == 2 * model.num_layers * model.num_attention_heads * model.head_dim * tokens**2


def test_a_step_by_hand() -> None:
    """7B, 1,000-token prompts and responses: 2 x 7.07e9 x 2,000 + 2 x 28 x 3,584 x 2,000^2 FLOPs forward."""
    assumed = Assumptions(mfu=0.4, gpu_tflops=1000.0, mean_prompt=1000, mean_response=1000, rollout_speed=2500.0)
    step = step_work(full("7b"), SEVEN_B, assumed)
    forward = 2 * 7_070_285_824 * 2000 + 2 * 28 * 3584 * 2000**2
    assert (step.generated_tokens, step.trained_tokens) == (256 * 8 * 1000, 128 * 8 * 1000)
    assert step.rollout_flops == pytest.approx(2048 * forward)
    assert (step.score_flops, step.update_flops) == (pytest.approx(1024 * forward), pytest.approx(3072 * forward))
    assert step.rollout_seconds == pytest.approx(2_048_000 / (2500 * 96))
    assert step.train_seconds == pytest.approx(4096 * forward / (32 * 0.4e15))
    assert step.hours(1000) == pytest.approx(1000 * (step.rollout_seconds + step.train_seconds) / 3600)


def test_assumed_speed_is_five_percent_of_the_peak_and_work_grows_with_length() -> None:
    mean = step_work(full("7b"), SEVEN_B, Assumptions())
    assert mean.rollout_speed * mean.rollout_flops / mean.generated_tokens == pytest.approx(0.05 * 989e12)
    bound = step_work(full("7b"), SEVEN_B, Assumptions(), 16_384)
    assert bound.rollout_flops > 2 * mean.rollout_flops, "attention grows faster than the length"
    faster = step_work(full("7b"), SEVEN_B, replace(Assumptions(), mfu=0.7))
    assert faster.train_seconds == pytest.approx(mean.train_seconds / 2)
