"""Sizes of a model between `ModelConfig` and the config.json of Hugging Face, both ways.

    config = config_from_hf(AutoConfig.from_pretrained(folder))
    hf_config(config)                    # a LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig or MixtralConfig

A field that this model cannot express is an error by name, never a guess. `router_aux_loss_coef` is carried as a
number, though transformers normalises its auxiliary loss otherwise (docs/checkpoints.md).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.experiment.contracts import AssayError
from shared.megatron.config import ModelConfig, MoEConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class UnsupportedArchitecture(AssayError):
    """A model that Hugging Face's configurations and `GPTModel` as built here do not both describe."""


class DamagedFiles(AssayError):
    """A folder in Hugging Face format lacks files, or has some that cannot be read."""


# model_type -> its configuration class in transformers.
_CLASSES = {
    "llama": "LlamaConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "qwen3_moe": "Qwen3MoeConfig",
    "mixtral": "MixtralConfig",
}
# Field of a Hugging Face configuration -> the only values whose meaning this model has. Absent fields are fine.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "model_type": tuple(_CLASSES),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0, None),
    "use_sliding_window": (False,),
    "sliding_window": (None,),
    "quantization_config": (None,),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([], None),
    "router_jitter_noise": (0,),
}


def config_from_hf(config: PretrainedConfig) -> ModelConfig:
    """Sizes of the Llama, Qwen2, Qwen3, Qwen3-MoE or Mixtral model that `config` describes.

    Raises `UnsupportedArchitecture`.
    """
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
            f"cannot represent {shown}: supported are Llama, Qwen2, Qwen3, Qwen3-MoE and Mixtral with full attention, "
            "SiLU, plain rotary positions, no biases but Qwen2's, and experts in every layer or in none"
        )
    kind = fields["model_type"]
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
        qk_layernorm=kind in ("qwen3", "qwen3_moe"),
        tie_embeddings=fields["tie_word_embeddings"],
        norm_eps=fields["rms_norm_eps"],
        init_std=fields["initializer_range"],
        qkv_bias=kind == "qwen2",
        moe=_moe(fields) if kind in ("qwen3_moe", "mixtral") else None,
    )


def _moe(fields: Mapping[str, Any]) -> MoEConfig:
    return MoEConfig(
        num_experts=fields["num_local_experts"] if "num_local_experts" in fields else fields["num_experts"],
        top_k=fields["num_experts_per_tok"],
        moe_ffn_hidden_size=fields.get("moe_intermediate_size", fields["intermediate_size"]),
        norm_topk_prob=fields.get("norm_topk_prob", True),
        aux_loss_coeff=fields["router_aux_loss_coef"],
    )


def architecture(config: ModelConfig) -> str:
    """`model_type` of the Hugging Face architecture that computes the same. Raises `UnsupportedArchitecture`."""
    kinds = {
        # (experts, norms of queries and keys, biases of queries, keys and values)
        (False, False, False): "llama",
        (False, False, True): "qwen2",
        (False, True, False): "qwen3",
        (True, True, False): "qwen3_moe",
        (True, False, False): "mixtral",
    }
    kind = kinds.get((config.moe is not None, config.qk_layernorm, config.qkv_bias))
    if kind is None or (kind == "mixtral" and config.moe and not config.moe.norm_topk_prob):
        raise UnsupportedArchitecture(
            f"no Hugging Face architecture has qk_layernorm={config.qk_layernorm}, qkv_bias={config.qkv_bias} and "
            f"moe={config.moe}: Mixtral normalises its probabilities, Qwen3's norms come without biases; train such "
            "a model if it is to be exported"
        )
    if kind == "qwen2" and config.head_dim * config.num_attention_heads != config.hidden_size:
        raise UnsupportedArchitecture(
            f"head_dim={config.head_dim} with {config.num_attention_heads} heads and hidden_size={config.hidden_size}: "
            "vLLM's Qwen2 (qkv_bias=True) takes hidden_size / heads, whatever the file says; "
            f"train with head_dim={config.hidden_size // config.num_attention_heads} if it is to be exported"
        )
    return kind


def hf_config(config: ModelConfig, **fields: Any) -> PretrainedConfig:
    """Configuration object of transformers for `config`; `fields` (token ids, dtype) are added or replace.

    Token ids that are not given are None: the defaults of transformers' classes would end texts at token 2.
    Raises `UnsupportedArchitecture`.
    """
    import transformers

    kind = architecture(config)
    sizes: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_sequence_length,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rotary_base},
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if config.moe:
        sizes |= {"num_local_experts": config.moe.num_experts, "num_experts_per_tok": config.moe.top_k}
        sizes |= {"router_aux_loss_coef": config.moe.aux_loss_coeff}
        if kind == "mixtral":
            sizes["intermediate_size"] = config.moe.moe_ffn_hidden_size
        else:
            sizes |= {"moe_intermediate_size": config.moe.moe_ffn_hidden_size}
            sizes |= {"norm_topk_prob": config.moe.norm_topk_prob}
    return getattr(transformers, _CLASSES[kind])(**{**sizes, **fields})


def read_config(folder: Path) -> PretrainedConfig:
    """Configuration in `folder`/config.json. Raises `DamagedFiles` or `UnsupportedArchitecture`."""
    import transformers

    path = folder / "config.json"
    try:
        kind = json.loads(path.read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedFiles(
            f"{path} cannot be read ({error!r}): {folder} has to be a folder in Hugging Face format; copy it again"
        ) from error
    if kind not in _CLASSES:
        raise UnsupportedArchitecture(
            f"cannot represent model_type={kind!r} of {path}: supported are {', '.join(_CLASSES)}"
        )
    try:
        return getattr(transformers, _CLASSES[kind]).from_pretrained(folder)
    except Exception as error:  # transformers has no base class for what its validators raise
        raise DamagedFiles(f"transformers refuses {path} ({error}): mend the file, or copy it again") from error


def config_text(config: PretrainedConfig) -> str:
    """Text of config.json, in which older readers (transformers 4, and what follows it) find their names too."""
    fields = json.loads(config.to_json_string())
    fields |= {"architectures": [type(config).__name__.replace("Config", "ForCausalLM")]}
    fields |= {"rope_theta": fields["rope_parameters"]["rope_theta"], "torch_dtype": fields.get("dtype")}
    if fields["model_type"] == "qwen3_moe":
        fields["num_experts"] = fields["num_local_experts"]
    return json.dumps(fields, indent=2, sort_keys=True) + "\n"
