"""The whole model, token by token, against transformers' Mixtral and Qwen3-MoE with the same random weights."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, PretrainedConfig, Qwen3MoeConfig

from shared.megatron.config import ModelConfig
from shared.megatron.model import GPTModel, build_model, forward_logits
from tests.megatron.models import randomise
from tests.moe.models import MODEL

MIXTRAL = MODEL
QWEN3 = replace(MODEL, qk_layernorm=True, moe=replace(MODEL.moe, top_k=3, norm_topk_prob=False))


def hf_config(config: ModelConfig) -> PretrainedConfig:
    sizes = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_sequence_length,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rotary_base},
        "num_experts_per_tok": config.moe.top_k,
    }
    experts, inner = config.moe.num_experts, config.moe.moe_ffn_hidden_size
    if not config.qk_layernorm:
        return MixtralConfig(num_local_experts=experts, intermediate_size=inner, **sizes)
    return Qwen3MoeConfig(
        num_experts=experts, moe_intermediate_size=inner, norm_topk_prob=config.moe.norm_topk_prob, **sizes
    )


def hf_weights(model: GPTModel, config: ModelConfig) -> dict[str, torch.Tensor]:
    heads = config.num_attention_heads // config.num_query_groups
    weights = {
        "model.embed_tokens.weight": model.embedding.word_embeddings.weight,
        "model.norm.weight": model.decoder.final_layernorm.weight,
        "lm_head.weight": model.output_layer.weight,
    }
    for index, layer in enumerate(model.decoder.layers):
        qkv = layer.self_attention.linear_qkv.weight.unflatten(0, (config.num_query_groups, heads + 2, config.head_dim))
        ours = {
            "input_layernorm.weight": layer.input_layernorm.weight,
            "post_attention_layernorm.weight": layer.pre_mlp_layernorm.weight,
            "self_attn.q_proj.weight": qkv[:, :heads].flatten(0, 2),
            "self_attn.k_proj.weight": qkv[:, heads].flatten(0, 1),
            "self_attn.v_proj.weight": qkv[:, heads + 1].flatten(0, 1),
            "self_attn.o_proj.weight": layer.self_attention.linear_proj.weight,
            "mlp.gate.weight": layer.mlp.router.weight,
            "mlp.experts.gate_up_proj": layer.mlp.experts.fc1,
            "mlp.experts.down_proj": layer.mlp.experts.fc2,
        }
        if config.qk_layernorm:
            ours["self_attn.q_norm.weight"] = layer.self_attention.q_layernorm.weight
            ours["self_attn.k_norm.weight"] = layer.self_attention.k_layernorm.weight
        weights |= {f"model.layers.{index}.{name}": tensor for name, tensor in ours.items()}
    return weights


@pytest.mark.parametrize("config", [MIXTRAL, QWEN3], ids=["mixtral", "qwen3_moe"])
def test_logits_equal_transformers(config: ModelConfig) -> None:
    model = randomise(build_model(config, seed=5, device="cpu"))
    theirs = AutoModelForCausalLM.from_config(hf_config(config)).eval()
    theirs.load_state_dict(hf_weights(model, config))
    tokens_BT = torch.randint(0, config.vocab_size, (3, 13), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        ours_BTV, theirs_BTV = forward_logits(model, tokens_BT), theirs(tokens_BT).logits
    assert theirs_BTV.std() > 0.3
    torch.testing.assert_close(ours_BTV, theirs_BTV, atol=1e-5, rtol=0)
