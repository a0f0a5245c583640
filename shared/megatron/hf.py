"""Llama and Qwen3 (dense) weights between Hugging Face names and Megatron's, both ways from one table of views.

    model = from_hf(hf_model.config, hf_model.state_dict())
    hf_model = AutoModelForCausalLM.from_config(to_hf_config(model))
    hf_model.load_state_dict(to_hf_state_dict(model), strict=False)    # a tied head has no entry

A field of the Hugging Face configuration that this model cannot express is an error by name, never a guess. Rotary
positions need no permutation: both sides rotate halves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch

from shared.experiment.contracts import AssayError
from shared.megatron.config import ModelConfig
from shared.megatron.model import build_model, config_of, output_weight

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from transformers import PretrainedConfig


class UnsupportedArchitecture(AssayError):
    """A field of a Hugging Face configuration asks for something that `GPTModel` as built here does not do."""


class WeightsDoNotFit(AssayError):
    """A state dict lacks tensors, has unknown ones, or has one of another shape or kind."""


# Field of a Hugging Face configuration -> the only values whose meaning this model has. Absent fields are fine.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama", "qwen3"),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0, None),
    "use_sliding_window": (False,),
    "sliding_window": (None,),
    "quantization_config": (None,),
}


def config_from_hf(config: PretrainedConfig) -> ModelConfig:
    """Sizes of the Llama or Qwen3 model that `config` describes. Raises `UnsupportedArchitecture`."""
    fields = config.to_dict()
    rope = fields.get("rope_parameters") or {}
    wrong = [name for name, values in _REQUIRED.items() if fields.get(name, values[0]) not in values]
    wrong += ["layer_types"] if set(fields.get("layer_types") or ()) - {"full_attention"} else []
    wrong += ["rope_parameters"] if set(rope) - {"rope_type", "rope_theta", "partial_rotary_factor"} else []
    wrong += ["rope_parameters.rope_type"] if rope.get("rope_type") != "default" else []
    wrong += ["partial_rotary_factor"] if (rope.get("partial_rotary_factor") or 1) != 1 else []
    if wrong:
        shown = ", ".join(f"{name}={rope if 'rop' in name else fields.get(name)!r}" for name in wrong)
        raise UnsupportedArchitecture(
            f"cannot represent {shown}: supported are dense Llama and Qwen3 models with full attention, SiLU, plain "
            "rotary positions and no biases"
        )
    return ModelConfig(
        num_layers=fields["num_hidden_layers"],
        hidden_size=fields["hidden_size"],
        num_attention_heads=fields["num_attention_heads"],
        num_query_groups=fields["num_key_value_heads"],
        head_dim=fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"],
        ffn_hidden_size=fields["intermediate_size"],
        vocab_size=fields["vocab_size"],
        max_sequence_length=fields["max_position_embeddings"],
        rotary_base=float(rope["rope_theta"]),
        qk_layernorm=fields["model_type"] == "qwen3",
        tie_embeddings=fields["tie_word_embeddings"],
        norm_eps=fields["rms_norm_eps"],
        init_std=fields["initializer_range"],
    )


def to_hf_config(model: GPTModel) -> PretrainedConfig:
    """A `Qwen3Config` where queries and keys are normed, else a `LlamaConfig`."""
    from transformers import LlamaConfig, Qwen3Config

    config = config_of(model)
    return (Qwen3Config if config.qk_layernorm else LlamaConfig)(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_query_groups,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_sequence_length,
        rms_norm_eps=config.norm_eps,
        initializer_range=config.init_std,
        tie_word_embeddings=config.tie_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": config.rotary_base},
    )


def from_hf(
    config: PretrainedConfig, state_dict: Mapping[str, torch.Tensor], device: torch.device | str | None = None
) -> GPTModel:
    """A float32 model with the weights of a Hugging Face `state_dict`, all of them and no others.

    Raises `UnsupportedArchitecture` or `WeightsDoNotFit`.
    """
    model = build_model(config_from_hf(config), seed=0, device=device)
    tensors = dict(state_dict)
    head = tensors.pop("lm_head.weight", None) if config.tie_word_embeddings else None
    views = _hf_views(model)
    if tensors.keys() != views.keys():
        missing, unknown = sorted(views.keys() - tensors.keys()), sorted(tensors.keys() - views.keys())
        raise WeightsDoNotFit(f"missing {missing}, unknown {unknown}: check that config and weights belong together")
    for name, view in views.items():
        shape = _hf_form(view).shape
        if tensors[name].shape != shape or not tensors[name].is_floating_point():
            raise WeightsDoNotFit(
                f"{name} is {tensors[name].dtype} of shape {tuple(tensors[name].shape)}, expected floats of shape "
                f"{tuple(shape)}: check that config and weights belong together"
            )
    if head is not None and not torch.equal(head, tensors["model.embed_tokens.weight"]):
        raise WeightsDoNotFit("lm_head.weight differs from the embedding though tie_word_embeddings=True: set it False")
    with torch.no_grad():
        for name, view in views.items():
            view.copy_(tensors[name].view(view.shape))
    return model


def to_hf_state_dict(model: GPTModel) -> dict[str, torch.Tensor]:
    """Copies of all weights under Hugging Face names; as in Hugging Face files, a tied head has no entry."""
    return {name: _hf_form(view.detach()).clone() for name, view in _hf_views(model).items()}


def _hf_form(view: torch.Tensor) -> torch.Tensor:
    return view.flatten(0, -2) if view.dim() > 1 else view


def _hf_views(model: GPTModel) -> dict[str, torch.Tensor]:
    """Hugging Face name -> view into the parameter that holds it; [groups, heads, head_dim, hidden] for q, k, v."""
    config = config_of(model)
    queries = config.num_attention_heads // config.num_query_groups
    decoder = cast(Any, model.decoder)
    views: dict[str, torch.Tensor] = {"model.embed_tokens.weight": model.embedding.word_embeddings.weight}
    for index, layer in enumerate(decoder.layers):
        attention, prefix = layer.self_attention, f"model.layers.{index}"
        qkv = attention.linear_qkv.weight.unflatten(0, (config.num_query_groups, queries + 2, config.head_dim))
        gate, up = layer.mlp.linear_fc1.weight.chunk(2)
        views |= {
            f"{prefix}.input_layernorm.weight": layer.input_layernorm.weight,
            f"{prefix}.self_attn.q_proj.weight": qkv[:, :queries],
            f"{prefix}.self_attn.k_proj.weight": qkv[:, queries : queries + 1],
            f"{prefix}.self_attn.v_proj.weight": qkv[:, queries + 1 :],
            f"{prefix}.self_attn.o_proj.weight": attention.linear_proj.weight,
            f"{prefix}.post_attention_layernorm.weight": layer.pre_mlp_layernorm.weight,
            f"{prefix}.mlp.gate_proj.weight": gate,
            f"{prefix}.mlp.up_proj.weight": up,
            f"{prefix}.mlp.down_proj.weight": layer.mlp.linear_fc2.weight,
        }
        if config.qk_layernorm:
            views[f"{prefix}.self_attn.q_norm.weight"] = attention.q_layernorm.weight
            views[f"{prefix}.self_attn.k_norm.weight"] = attention.k_layernorm.weight
    views["model.norm.weight"] = decoder.final_layernorm.weight
    if not config.tie_embeddings:
        views["lm_head.weight"] = output_weight(model)
    return views
