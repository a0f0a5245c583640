"""What is measured, against whom, and what counts as good enough: committed before the first measurement.

Standard library only. README.md says the same in words; tests compare the two.
"""

from __future__ import annotations

from dataclasses import dataclass

from shared.megatron.config import ModelConfig

PEERS = {"torch": "2.13.0", "transformers": "5.19.0", "megatron-core": "0.16.1"}
"""Package -> version that the committed results are about (pins of `pyproject.toml`)."""

REPETITIONS = 21
"""Interleaved rounds per shape; each contestant has one turn in a round, and the order rotates."""

CHECKPOINT_REPETITIONS = 9
RESUME_REPETITIONS = 5
RESUME_BATCH = (4, 256)

LR = 1e-3
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
GRAD_CLIP = 1.0


@dataclass(frozen=True)
class TrainingShape:
    """One model and batch. `steps` training steps make a turn; `target` is the ratio of speeds (ours / peer's)."""

    name: str
    model: ModelConfig
    batch: int
    length: int
    steps: int
    target: float


def _decoder(
    layers: int, hidden: int, heads: int, groups: int, ffn: int, vocab: int, length: int, tied: bool
) -> ModelConfig:
    return ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=hidden // heads,
        ffn_hidden_size=ffn,
        vocab_size=vocab,
        max_sequence_length=length,
        tie_embeddings=tied,
    )


TRAINING = (
    TrainingShape("h256-4x256", _decoder(4, 256, 8, 4, 704, 8192, 256, tied=False), 4, 256, steps=2, target=1.0),
    TrainingShape("h256-1x1024", _decoder(4, 256, 8, 4, 704, 8192, 1024, tied=False), 1, 1024, steps=2, target=1.0),
    TrainingShape("d64-64x24", _decoder(2, 64, 2, 2, 168, 284, 24, tied=True), 64, 24, steps=40, target=0.9),
)

STATE = _decoder(4, 256, 8, 4, 704, 8192, 256, tied=True)
"""Model of the checkpoint and resume rows: with AdamW's two moments in float32 its state is 60 MB."""
