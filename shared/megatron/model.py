"""The one decoder model: Megatron's `GPTModel` in the Llama / Qwen shape, on a CPU or a GPU, whole or in parts.

Build one and call it:

    config = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=2, num_query_groups=1, head_dim=32,
                         ffn_hidden_size=176, vocab_size=284, max_sequence_length=64)
    model = build_model(config, seed=0)
    logits_BTV = forward_logits(model, tokens_BT)

`model.named_parameters()`, `state_dict()` and `train()` are those of any torch module. After `initialize` with a layout
of several processes, the same calls build and run this rank's part; `shared.megatron.parallel` trains it.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F

from shared.experiment.contracts import AssayError
from shared.megatron.config import ModelConfig
from shared.megatron.fused import cross_entropy_
from shared.megatron.init import current_layout, initialize, quiet_imports
from shared.megatron.layout import ImpossibleLayout, Layout
from shared.megatron.spec import RotaryTable, SequenceTooLong, decoder_spec, layer_spec

with quiet_imports():
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
    from megatron.core.transformer.spec_utils import ModuleSpec, build_module
    from megatron.core.transformer.transformer_config import TransformerConfig


class AlreadyUntied(AssayError):
    """`untie` was given a model that has its own output head."""


def build_model(config: ModelConfig, seed: int, device: torch.device | str | None = None) -> GPTModel:
    """A float32 model whose weights depend on `config` and `seed` alone: not on the device, not on the global RNG.

    `device` defaults to the first GPU when there is one. Megatron and torch keep their random state. Under a layout
    this is the rank's part. Raises `ImpossibleLayout` if that is several chunks: see `build_chunks`.
    """
    if current_layout().virtual_pp > 1:
        raise ImpossibleLayout("virtual_pp > 1 gives every rank several models: call build_chunks")
    return build_chunks(config, seed, device)[0]


def build_chunks(
    config: ModelConfig,
    seed: int | None,
    device: torch.device | str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    backend: Literal["local", "te"] = "local",
) -> list[GPTModel]:
    """This rank's parts of the model: one, or `virtual_pp` under the interleaved schedule.

    The weights are those of one process, sliced: they depend on `config` and `seed`, not on the layout (and are drawn
    in float32 before they become `dtype`). Without a seed they are left unset, for whoever loads them next. For
    `backend` see `shared.megatron.spec.layer_spec`.
    """
    from shared.megatron.shim import construction

    device = initialize(device)
    layout = current_layout()
    layout.check_model(config)
    with construction(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="full scope is deprecated", category=UserWarning)
        chunks = []
        for stage in range(layout.virtual_pp):
            torch.manual_seed(seed or 0)
            chunks.append(_build_chunk(config, seed, dtype, backend, stage if layout.virtual_pp > 1 else None))
    return [chunk.to(device) for chunk in chunks]


def _build_chunk(
    config: ModelConfig, seed: int | None, dtype: torch.dtype, backend: Literal["local", "te"], vp_stage: int | None
) -> GPTModel:
    layout = current_layout()
    megatron = _transformer_config(config, dtype)
    megatron.perform_initialization = seed is not None
    # Megatron's name for an activation that the layer spec brings along, as `_local_layer` does.
    megatron.use_te_activation_func = backend == "local"
    layer = layer_spec(config, backend)
    count = config.num_layers // (layout.pp * layout.virtual_pp)
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
    before = count * ((vp_stage or 0) * layout.pp + parallel_state.get_pipeline_model_parallel_rank())
    if seed is not None:
        _draw_what_lies_before(megatron, layer, before, config.vocab_size, vp_stage)
    model = GPTModel(
        megatron,
        decoder_spec(layer, count, backend),  # pyright: ignore[reportArgumentType]
        vocab_size=config.vocab_size,
        max_sequence_length=config.max_sequence_length,
        pre_process=first,
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        share_embeddings_and_output_weights=config.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=config.rotary_base,  # pyright: ignore[reportArgumentType]
        vp_stage=vp_stage,
    )
    # Sequence parallelism pads: see forward_logits.
    padding = -config.max_sequence_length % layout.tp if layout.sequence_parallel else 0
    model.rotary_pos_emb = RotaryTable(config.head_dim, config.rotary_base, config.max_sequence_length + padding)
    cast(Any, model).model_config = config
    return model


def _draw_what_lies_before(
    megatron: TransformerConfig, layer: ModuleSpec, layers: int, vocab_size: int, vp_stage: int | None
) -> None:
    """Advance the generator past the embedding and the first `layers` layers, which earlier pipeline stages hold."""
    if layers:
        cast(Any, megatron.init_method)(torch.empty(vocab_size, megatron.hidden_size))
    for _ in range(layers):
        build_module(layer, config=megatron, layer_number=1, vp_stage=vp_stage)


def _transformer_config(config: ModelConfig, dtype: torch.dtype) -> TransformerConfig:
    experts: dict[str, Any] = {}
    if config.moe:
        experts = {
            "num_moe_experts": config.moe.num_experts,
            "moe_router_topk": config.moe.top_k,
            "moe_router_pre_softmax": True,  # as our router does; Megatron refuses top-1 without
            "moe_ffn_hidden_size": config.moe.moe_ffn_hidden_size,
            "moe_aux_loss_coeff": config.moe.aux_loss_coeff,
        }
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        kv_channels=config.head_dim,
        ffn_hidden_size=config.ffn_hidden_size,
        qk_layernorm=config.qk_layernorm,
        add_qkv_bias=config.qkv_bias,
        layernorm_epsilon=config.norm_eps,
        init_method_std=config.init_std,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        pipeline_dtype=dtype,
        # Each of these wants a CUDA extension, Transformer Engine or a compiler.
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        **experts,
        **_parallel_settings(current_layout()),
    )


def _parallel_settings(layout: Layout) -> dict[str, Any]:
    recompute: dict[str, Any] = {} if layout.recompute == "none" else {"recompute_granularity": layout.recompute}
    if layout.recompute == "full":
        recompute |= {"recompute_method": "uniform", "recompute_num_layers": 1}
    return {
        # Gradients are sums over tokens until the number of tokens in the global batch is known.
        "calculate_per_token_loss": True,
        "tensor_model_parallel_size": layout.tp,
        "sequence_parallel": layout.sequence_parallel,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.virtual_pp if layout.virtual_pp > 1 else None,
        # gloo still reads what it sends when Megatron frees it; nccl works in stream order.
        "deallocate_pipeline_outputs": layout.pp > 1 and torch.cuda.is_available(),
        # With two stages, interleaving sends both ways between the same two ranks at once, and a batch of sends would
        # pair them wrongly.
        "overlap_p2p_comm": layout.virtual_pp > 1,
        "batch_p2p_comm": layout.virtual_pp == 1,
        "context_parallel_size": layout.cp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": 1,
        **recompute,
    }


def config_of(model: GPTModel) -> ModelConfig:
    """The configuration that `build_model` would need to build a model of this shape."""
    return cast(Any, model).model_config


def output_weight(model: GPTModel) -> torch.Tensor:
    """The [vocab, hidden] matrix that makes logits: the embedding if tied (and on this rank), else the output head."""
    tied = model.share_embeddings_and_output_weights and model.pre_process
    return cast(torch.Tensor, (model.embedding.word_embeddings if tied else model.output_layer).weight)


def forward_logits(model: GPTModel, tokens_BT: torch.Tensor) -> torch.Tensor:
    """Float32 next-token logits [B, T, V] of int64 tokens [B, T]; position t sees tokens 0 .. t only.

    Padding on the right changes nothing to its left. Equal to `model(tokens_BT, None, None)`, which transposes the
    logits instead of the hidden states: a tenth of a training step for a small model. Under tensor parallelism every
    rank gets all logits, and gradients are right if every rank computes the same loss from them.

    Raises `SequenceTooLong`, and `ImpossibleLayout` under pipeline or context parallelism.
    """
    layout = current_layout()
    if layout.pp > 1 or layout.cp > 1:
        raise ImpossibleLayout(f"forward_logits needs pp = cp = 1 and runs under {layout}: train with ParallelModel")
    length = tokens_BT.shape[1]
    require_positions(model, length)
    if layout.sequence_parallel:
        tokens_BT = F.pad(tokens_BT, (0, -length % layout.tp))
    hidden_TBH = run_layers(model, tokens_BT)
    if layout.tp == 1:
        return _own_logits(model, hidden_TBH)
    logits_TBV, _ = model.output_layer(hidden_TBH, weight=output_weight(model), runtime_gather_output=True)
    return logits_TBV[:length].transpose(0, 1).float()


def require_positions(model: GPTModel, length: int) -> None:
    """Raise `SequenceTooLong` if whole sequences of `length` tokens do not fit: the rotary table has room to pad."""
    limit = config_of(model).max_sequence_length
    if length > limit:
        raise SequenceTooLong(
            f"{length} positions do not fit into max_sequence_length={limit}: "
            "shorten the sequences, or build the model with a larger max_sequence_length"
        )


def run_layers(model: GPTModel, tokens_BT: torch.Tensor) -> torch.Tensor:
    """Hidden states [T, B, H] after this rank's layers, of the tokens or, on later pipeline stages, of what came in.

    Under context parallelism `tokens_BT` is this rank's part; under sequence parallelism the result is.
    """
    return model.decoder(
        hidden_states=model.embedding(input_ids=tokens_BT, position_ids=None) if model.pre_process else None,
        attention_mask=None,
        rotary_pos_emb=model.rotary_pos_emb(tokens_BT.shape[1] * current_layout().cp),
    )


def token_losses(model: GPTModel, hidden_TBH: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Cross-entropy [B, T] in nats, float32, of the last pipeline stage; equal on all tensor-parallel ranks."""
    if current_layout().tp == 1:
        logits_BTV = _own_logits(model, hidden_TBH)
        return cross_entropy_(logits_BTV.flatten(0, 1), labels_BT.flatten(), "none").view_as(labels_BT)
    logits_TBV, _ = model.output_layer(hidden_TBH, weight=output_weight(model))
    return cast(torch.Tensor, vocab_parallel_cross_entropy(logits_TBV.float(), labels_BT.T.contiguous())).T


def _own_logits(model: GPTModel, hidden_TBH: torch.Tensor) -> torch.Tensor:
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
