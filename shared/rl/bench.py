"""The shared CPU bench of the RL papers: warm starts and regimes H, U and the plain Countdown bench.

Regime T (tabular) is `shared.rl.tabular`. What the regimes are for, and why these: docs/regimes.md.
Every function returns a whole config; the rule under test is the only argument that differs between arms.
"""

from __future__ import annotations

from dataclasses import replace

from shared.data.tasks.countdown import PlainCountdown, StyledCountdown
from shared.megatron.model import ModelConfig
from shared.rl.config import OptimizerConfig, RLConfig
from shared.rl.losses import PolicyLoss
from shared.rl.pipeline import Terms
from shared.training.sft import SFTConfig


def _tiny(layers: int, vocab_size: int, length: int) -> ModelConfig:
    return ModelConfig(
        num_layers=layers,
        hidden_size=64,
        num_attention_heads=2,
        num_query_groups=2,
        head_dim=32,
        ffn_hidden_size=168,
        vocab_size=vocab_size,
        max_sequence_length=length,
        qk_layernorm=True,
        tie_embeddings=True,
    )


def styled_sft() -> SFTConfig:
    """Warm start of regimes H and U: Countdown with style words, 115,904 parameters, 1,800 steps."""
    task = StyledCountdown()
    return SFTConfig(model=_tiny(2, task.vocab_size, 40), task=task, steps=1800)


def plain_sft() -> SFTConfig:
    """Warm start of the plain Countdown bench: character vocabulary, 4 layers, 1,000 steps."""
    task = PlainCountdown()
    return SFTConfig(model=_tiny(4, task.vocab_size, 48), task=task, steps=1000)


def regime_h(loss: PolicyLoss, *, eps_high: float = 0.2, terms: Terms | None = None) -> RLConfig:
    """Regime H: an untied head that learns 30 times faster than the body, so that a token's logit is nearly its own."""
    sft = styled_sft()
    return RLConfig(
        loss=loss,
        task=sft.task,
        model=sft.model,
        policy="styled_sft",
        untie_head=True,
        optimizer=OptimizerConfig(body_lr=5e-5, head_lr=1.5e-3),
        terms=terms or Terms(),
        eps_high=eps_high,
        matched_reward=0.58,
    )


def regime_u(loss: PolicyLoss, *, eps_high: float = 0.2) -> RLConfig:
    """Regime U, the counter-example: as H, with the tied head and one learning rate for all weights."""
    return replace(regime_h(loss, eps_high=eps_high), untie_head=False, optimizer=OptimizerConfig(body_lr=4e-4))


def plain_bench(loss: PolicyLoss, *, eps_high: float = 0.2) -> RLConfig:
    """The plain Countdown bench with token re-use: 32 prompts x 16 samples, 4 epochs x 4 mini-batches."""
    sft = plain_sft()
    return RLConfig(
        loss=loss,
        task=sft.task,
        model=sft.model,
        policy="plain_sft",
        optimizer=OptimizerConfig(body_lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01, warmup_rollouts=3),
        prompts=32,
        gen_prompts=32,
        samples=16,
        rollouts=80,
        minibatches=4,
        epochs=4,
        eps_high=eps_high,
        eval_every=80,
    )
