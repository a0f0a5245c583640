"""One leg of a training run that changes its layout: load, two steps, save. Imports little, for ranks to start fast."""

from __future__ import annotations

from dataclasses import replace

from shared.data.markov import MarkovText
from shared.megatron.config import ModelConfig, MoEConfig
from shared.megatron.init import current_layout
from shared.megatron.parallel import ParallelModel
from shared.training.distributed_checkpoint import DistributedCheckpoints
from shared.training.manifest import Contents
from shared.training.pretrain import PretrainConfig, microbatches, own_rows

STEPS = 2
DENSE = PretrainConfig(
    ModelConfig(
        num_layers=4, hidden_size=32, num_attention_heads=4, num_query_groups=2, head_dim=8, ffn_hidden_size=48,
        vocab_size=32, max_sequence_length=16, tie_embeddings=True, qk_layernorm=True,
    ),
    sequence_length=16, global_batch_size=8, micro_batch_size=2, steps=100, lr=1e-3,
)  # fmt: skip
MOE = replace(
    DENSE,
    model=replace(DENSE.model, num_layers=2, moe=MoEConfig(num_experts=4, top_k=2, moe_ffn_hidden_size=16)),
)
TEXT = MarkovText(vocab_size=32)


def build(config: PretrainConfig) -> ParallelModel:
    return ParallelModel(config.model, config.optimizer(), seed=config.seed, precision=config.precision)


def train(model: ParallelModel, config: PretrainConfig, first: int) -> list[float]:
    """Losses and gradient norms of `STEPS` steps from `first` on."""
    values = []
    for step in range(first, first + STEPS):
        sequences = TEXT.training(0, step, own_rows(config, current_layout()), config.sequence_length + 1)
        result = model.train_step(microbatches(config, sequences), config.lr)
        values += [result.loss, result.grad_norm]
    return values


def save(model: ParallelModel, config: PretrainConfig, step: int, target: str, asynchronous: bool = True) -> None:
    contents = Contents(config.model, current_layout(), config.optimizer(), config.precision, TEXT, 0, 0)
    checkpoints = DistributedCheckpoints(target)
    checkpoints.save(step, model.sharded_state(), contents, asynchronous=asynchronous)
    checkpoints.wait()


def leg(rank: int, config: PretrainConfig, source: str, first: int, target: str) -> list[float]:
    """Load the checkpoint in `source`, train from step `first` on, save to `target`."""
    model = build(config)
    checkpoints = DistributedCheckpoints(source)
    found = checkpoints.latest()
    assert found is not None
    assert found.step == first
    state = model.sharded_state(loading=True)
    model.load_sharded_state(checkpoints.load(found, state, model=config.model, precision=config.precision))
    values = train(model, config, first)
    save(model, config, first + STEPS, target)
    return values
