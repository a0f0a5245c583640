"""How large the models of a check are. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from shared.megatron.config import ModelConfig


@dataclass(frozen=True)
class Speed:
    """A training step that is timed: `rows` sequences of `length` tokens, `micro_rows` at once.

    needs_gib: memory of the GPU without which it is skipped.
    """

    model: ModelConfig
    length: int
    rows: int
    micro_rows: int
    steps: int
    needs_gib: float = 0.0


@dataclass(frozen=True)
class Sizes:
    """`model` is trained for `steps` global batches of `rows` sequences of `length` tokens; two models are timed."""

    model: ModelConfig
    steps: int
    rows: int
    micro_rows: int
    length: int
    new_tokens: int
    base: Speed
    large: Speed


def _model(layers: int, hidden: int, heads: int, groups: int, head_dim: int, ffn: int, vocab: int) -> ModelConfig:
    return ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=head_dim,
        ffn_hidden_size=ffn,
        vocab_size=vocab,
        max_sequence_length=1024,
        qk_layernorm=True,
    )


GPU = Sizes(
    model=_model(4, 256, 8, 4, 32, 704, 1024),
    steps=20,
    rows=16,
    micro_rows=4,
    length=128,
    new_tokens=64,
    base=Speed(_model(8, 1024, 16, 16, 64, 2816, 32768), 1024, 32, 8, 10, needs_gib=15),
    large=Speed(_model(16, 2048, 16, 16, 128, 5632, 32768), 1024, 32, 8, 10, needs_gib=39),
)
"""On a real GPU. 3 million parameters are compared; 136 million and 0.9 billion are timed."""

_TINY = _model(2, 32, 4, 2, 8, 48, 64)
DRY = Sizes(
    model=_TINY,
    steps=4,
    rows=4,
    micro_rows=2,
    length=16,
    new_tokens=8,
    base=Speed(_TINY, 16, 4, 2, 2),
    large=Speed(_TINY, 16, 4, 2, 2),
)
"""For `--device cpu`, which only exercises the code."""
