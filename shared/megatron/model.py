"""The one decoder model: Megatron's `GPTModel` in the dense Llama / Qwen3 shape, on a CPU or a GPU.

Build one and call it:

    config = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=2, num_query_groups=1, head_dim=32,
                         ffn_hidden_size=176, vocab_size=284, max_sequence_length=64)
    model = build_model(config, seed=0)
    logits_BTV = forward_logits(model, tokens_BT)

`model.named_parameters()`, `state_dict()` and `train()` are those of any torch module.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, cast

import torch

from shared.experiment.contracts import AssayError
from shared.megatron.config import ModelConfig
from shared.megatron.init import initialize, quiet_imports
from shared.megatron.spec import RotaryTable, decoder_spec

with quiet_imports():
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig


class AlreadyUntied(AssayError):
    """`untie` was given a model that has its own output head."""


def build_model(config: ModelConfig, seed: int, device: torch.device | str | None = None) -> GPTModel:
    """A float32 model whose weights depend on `config` and `seed` alone: not on the device, not on the global RNG.

    `device` defaults to the first GPU when there is one. Megatron and torch keep their random state.
    """
    device = initialize(device)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="full scope is deprecated", category=UserWarning)
        torch.manual_seed(seed)
        model = GPTModel(
            _transformer_config(config),
            decoder_spec(config.num_layers, config.qk_layernorm),  # pyright: ignore[reportArgumentType]
            vocab_size=config.vocab_size,
            max_sequence_length=config.max_sequence_length,
            share_embeddings_and_output_weights=config.tie_embeddings,
            position_embedding_type="rope",
            rotary_base=config.rotary_base,  # pyright: ignore[reportArgumentType]
        )
    model.rotary_pos_emb = RotaryTable(config.head_dim, config.rotary_base, config.max_sequence_length)
    return model.to(device)


def _transformer_config(config: ModelConfig) -> TransformerConfig:
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        kv_channels=config.head_dim,
        ffn_hidden_size=config.ffn_hidden_size,
        qk_layernorm=config.qk_layernorm,
        layernorm_epsilon=config.norm_eps,
        init_method_std=config.init_std,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        # Each of these wants a CUDA extension, Transformer Engine or a compiler.
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )


def config_of(model: GPTModel) -> ModelConfig:
    """The configuration that `build_model` would need to build a model of this shape."""
    megatron = cast(Any, model.config)
    return ModelConfig(
        num_layers=megatron.num_layers,
        hidden_size=megatron.hidden_size,
        num_attention_heads=megatron.num_attention_heads,
        num_query_groups=megatron.num_query_groups,
        head_dim=megatron.kv_channels,
        ffn_hidden_size=megatron.ffn_hidden_size,
        vocab_size=model.vocab_size,
        max_sequence_length=model.max_sequence_length,
        rotary_base=model.rotary_base,
        qk_layernorm=megatron.qk_layernorm,
        tie_embeddings=model.share_embeddings_and_output_weights,
        norm_eps=megatron.layernorm_epsilon,
        init_std=megatron.init_method_std,
    )


def output_weight(model: GPTModel) -> torch.Tensor:
    """The [vocab, hidden] matrix that makes logits: the embedding if tied, else the output head."""
    tied = model.share_embeddings_and_output_weights
    return cast(torch.Tensor, (model.embedding.word_embeddings if tied else model.output_layer).weight)


def forward_logits(model: GPTModel, tokens_BT: torch.Tensor) -> torch.Tensor:
    """Float32 next-token logits [B, T, V] of int64 tokens [B, T]; position t sees tokens 0 .. t only.

    Padding on the right changes nothing to its left. Equal to `model(tokens_BT, None, None)`, which transposes the
    logits instead of the hidden states: a tenth of a training step for a small model. Raises `SequenceTooLong`.
    """
    hidden_TBH = model.decoder(
        hidden_states=model.embedding(input_ids=tokens_BT, position_ids=None),
        attention_mask=None,
        rotary_pos_emb=model.rotary_pos_emb(tokens_BT.shape[1]),
    )
    logits_BTV, _ = model.output_layer(hidden_TBH.transpose(0, 1).contiguous(), weight=output_weight(model))
    return logits_BTV.float()


def untie(model: GPTModel) -> GPTModel:
    """A copy, on the same device, whose output head is its own parameter and starts as the embedding."""
    config = config_of(model)
    if not config.tie_embeddings:
        raise AlreadyUntied(
            "the model has an output head of its own: for a plain copy, load its state_dict() into "
            "build_model(config_of(model), seed=0)"
        )
    embedding = model.embedding.word_embeddings.weight
    copy = build_model(replace(config, tie_embeddings=False), seed=0, device=embedding.device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            copy.get_parameter(name).copy_(parameter)
        output_weight(copy).copy_(embedding)
    return copy


def parameter_count(model: GPTModel) -> int:
    """Number of trainable scalars; a tied embedding counts once."""
    return sum(parameter.numel() for parameter in model.parameters())
