"""A Llama in as little torch as a careful person would write: the peer that has no framework to carry.

Fused QKV and gate-up projections, torch's SDPA and RMSNorm, cosines and sines computed once. Takes Hugging Face names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.megatron.config import ModelConfig


class MinimalLlama(nn.Module):
    """int64 tokens [B, T] -> float32 logits [B, T, V]; causal, no dropout, no biases, no cache."""

    cos_TD: Tensor
    sin_TD: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        inverse_E = config.rotary_base ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
        angle_TE = torch.arange(config.max_sequence_length)[:, None] * inverse_E
        angle_TD = torch.cat((angle_TE, angle_TE), -1)
        self.register_buffer("cos_TD", angle_TD.cos(), persistent=False)
        self.register_buffer("sin_TD", angle_TD.sin(), persistent=False)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTH = self.embedding(tokens_BT)
        cos_TD, sin_TD = self.cos_TD[: tokens_BT.shape[1]], self.sin_TD[: tokens_BT.shape[1]]
        for layer in self.layers:
            x_BTH = layer(x_BTH, cos_TD, sin_TD)
        return self.head(self.norm(x_BTH))

    @torch.no_grad()
    def load_hf(self, state: Mapping[str, Tensor]) -> None:
        """Copy the weights of a Hugging Face Llama state dict."""
        self.embedding.weight.copy_(state["model.embed_tokens.weight"])
        self.norm.weight.copy_(state["model.norm.weight"])
        self.head.weight.copy_(state.get("lm_head.weight", state["model.embed_tokens.weight"]))
        layer: Any
        for index, layer in enumerate(self.layers):
            p = f"model.layers.{index}"
            layer.qkv.weight.copy_(torch.cat([state[f"{p}.self_attn.{name}_proj.weight"] for name in "qkv"]))
            layer.out.weight.copy_(state[f"{p}.self_attn.o_proj.weight"])
            layer.gate_up.weight.copy_(torch.cat([state[f"{p}.mlp.{name}_proj.weight"] for name in ("gate", "up")]))
            layer.down.weight.copy_(state[f"{p}.mlp.down_proj.weight"])
            layer.norm_1.weight.copy_(state[f"{p}.input_layernorm.weight"])
            layer.norm_2.weight.copy_(state[f"{p}.post_attention_layernorm.weight"])


class Layer(nn.Module):
    """Pre-norm grouped-query attention and SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.groups, self.dim = config.num_attention_heads, config.num_query_groups, config.head_dim
        hidden, ffn = config.hidden_size, config.ffn_hidden_size
        self.norm_1, self.norm_2 = nn.RMSNorm(hidden, config.norm_eps), nn.RMSNorm(hidden, config.norm_eps)
        self.qkv = nn.Linear(hidden, (self.heads + 2 * self.groups) * self.dim, bias=False)
        self.out = nn.Linear(self.heads * self.dim, hidden, bias=False)
        self.gate_up = nn.Linear(hidden, 2 * ffn, bias=False)
        self.down = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x_BTH: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        x_BTH = x_BTH + self.attention(self.norm_1(x_BTH), cos_TD, sin_TD)
        gate, up = self.gate_up(self.norm_2(x_BTH)).chunk(2, -1)
        return x_BTH + self.down(F.silu(gate) * up)

    def attention(self, x_BTH: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        batch, length, _ = x_BTH.shape
        qkv = self.qkv(x_BTH).view(batch, length, -1, self.dim).transpose(1, 2)
        q, k, v = qkv.split((self.heads, self.groups, self.groups), dim=1)
        q, k = rotate(q, cos_TD, sin_TD), rotate(k, cos_TD, sin_TD)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.groups != self.heads)
        return self.out(out.transpose(1, 2).reshape(batch, length, -1))


def rotate(x_BNTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotary positions on halves, as everybody writes them."""
    first, second = x_BNTD.chunk(2, -1)
    return x_BNTD * cos_TD + torch.cat((-second, first), -1) * sin_TD
