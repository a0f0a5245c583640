"""One transformer step with a KV cache, straight on the parameters of a dense `GPTModel`.

Rows of a batch end in the same column: shorter prompts are padded on the left, and padding is masked. Every prompt
token of a row keeps its own position, so the padding leaves no trace in the logits.

Under tensor parallelism every rank decodes its heads and its slice of the MLPs, and all ranks get the same logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F

from shared.engines.contracts import UnsupportedModel
from shared.megatron.fused import rotate
from shared.megatron.init import current_layout
from shared.megatron.model import config_of, output_weight
from shared.megatron.spec import MLP, IdentityOp, RMSNorm, RotaryAttention, RotaryTable, SDPACoreAttention

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


@dataclass
class Cache:
    """Keys and values [B, groups, columns, head_dim] per layer; the first `end` columns are filled.

    `padding_B` is the number of padding columns left of each row, None where no row has any.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    end: int
    padding_B: torch.Tensor | None

    def select(self, rows_B: torch.Tensor) -> Cache:
        """A copy of some rows, in the order given, repeats allowed."""
        return Cache(
            keys=[key[rows_B] for key in self.keys],
            values=[value[rows_B] for value in self.values],
            end=self.end,
            padding_B=None if self.padding_B is None else self.padding_B[rows_B],
        )


class Decoder:
    """Logits of the next token for a batch of rows. Reads the parameters at every call."""

    def __init__(self, model: GPTModel):
        _require_dense(model)
        self.model = model
        self.config = config_of(model)
        self.repeats = self.config.num_attention_heads // self.config.num_query_groups
        self.ranks = _TensorRanks(model)
        self.groups = self.config.num_query_groups // self.ranks.size

    @property
    def device(self) -> torch.device:
        return self.model.embedding.word_embeddings.weight.device

    def prefill(self, prompts: Sequence[Sequence[int]], room: int) -> tuple[torch.Tensor, Cache]:
        """Read prompts -> float32 logits [B, V] after their last token, and a cache with `room` free columns."""
        config, columns = self.config, max(len(prompt) for prompt in prompts)
        padding = [columns - len(prompt) for prompt in prompts]
        tokens_BT = torch.tensor([[0] * pad + list(p) for pad, p in zip(padding, prompts, strict=True)])
        shape = (len(prompts), self.groups, columns + room, config.head_dim)
        dtype, device = self.model.embedding.word_embeddings.weight.dtype, self.device
        cache = Cache(
            keys=[torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_layers)],
            values=[torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_layers)],
            end=0,
            padding_B=torch.tensor(padding, device=device) if any(padding) else None,
        )
        return self._forward(tokens_BT.to(device), cache), cache

    def decode(self, tokens_B: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Append one token per row -> float32 logits [B, V] after it."""
        return self._forward(tokens_B[:, None], cache)

    def _forward(self, tokens_BT: torch.Tensor, cache: Cache) -> torch.Tensor:
        start, cache.end = cache.end, cache.end + tokens_BT.shape[1]
        cos, sin = self._rotation(start, cache)
        mask = _mask(start, cache)
        x_BTH = self.ranks.embed(tokens_BT)
        for index, layer in enumerate(cast(Any, self.model.decoder.layers)):
            attention = layer.self_attention
            qkv = F.linear(layer.input_layernorm(x_BTH), attention.linear_qkv.weight, attention.linear_qkv.bias)
            mixed = self._attend(attention, qkv, cos, sin, mask, (cache.keys[index], cache.values[index]), start)
            x_BTH = x_BTH + self.ranks.sum(F.linear(mixed, attention.linear_proj.weight))
            gate, up = F.linear(layer.pre_mlp_layernorm(x_BTH), layer.mlp.linear_fc1.weight).chunk(2, -1)
            x_BTH = x_BTH + self.ranks.sum(F.linear(F.silu(gate) * up, layer.mlp.linear_fc2.weight))
        last_BH = cast(RMSNorm, self.model.decoder.final_layernorm)(x_BTH[:, -1])
        return self.ranks.join(F.linear(last_BH, output_weight(self.model))).float()

    def _attend(
        self,
        attention: Any,
        qkv_BTF: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor | None,
        cache: tuple[torch.Tensor, torch.Tensor],
        start: int,
    ) -> torch.Tensor:
        batch, length, _ = qkv_BTF.shape
        keys, values = cache
        end = start + length
        # Megatron's layout: in every group the queries, then one key, one value.
        qkv = qkv_BTF.view(batch, length, self.groups, self.repeats + 2, self.config.head_dim)
        query, key = qkv[..., : self.repeats, :], qkv[..., self.repeats : self.repeats + 1, :]
        query, key = attention.q_layernorm(query), attention.k_layernorm(key)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        keys[:, :, start:end] = key.squeeze(3).transpose(1, 2)
        values[:, :, start:end] = qkv[..., self.repeats + 1, :].transpose(1, 2)
        out = F.scaled_dot_product_attention(
            query.flatten(2, 3).transpose(1, 2),
            keys[:, :, :end],
            values[:, :, :end],
            attn_mask=mask,
            is_causal=mask is None and length > 1,
            enable_gqa=self.repeats > 1,
        )
        return out.transpose(1, 2).flatten(2)

    def _rotation(self, start: int, cache: Cache) -> tuple[torch.Tensor, torch.Tensor]:
        freqs_T11D = cast(RotaryTable, self.model.rotary_pos_emb).freqs_T11D
        if cache.padding_B is None:
            freqs = freqs_T11D[start : cache.end]
        else:
            columns_T = torch.arange(start, cache.end, device=self.device)
            freqs = freqs_T11D[(columns_T - cache.padding_B[:, None]).clamp(min=0)]
        return freqs.cos(), freqs.sin()


class _TensorRanks:
    """Sums and slices over the tensor-parallel ranks; with one rank, nothing happens."""

    def __init__(self, model: GPTModel):
        self.size = current_layout().tp
        self._table = cast(torch.nn.Parameter, model.embedding.word_embeddings.weight)
        if self.size > 1:
            from megatron.core import parallel_state

            self._group: Any = parallel_state.get_tensor_model_parallel_group()
            self._first = dist.get_rank(self._group) * self._table.shape[0]

    def embed(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """[B, T, H] from the slices of the vocabulary."""
        if self.size == 1:
            return F.embedding(tokens_BT, self._table)
        own_BT = tokens_BT - self._first
        elsewhere_BT = (own_BT < 0) | (own_BT >= self._table.shape[0])
        x_BTH = F.embedding(own_BT.masked_fill(elsewhere_BT, 0), self._table)
        return self.sum(x_BTH.masked_fill(elsewhere_BT[..., None], 0))

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """`x` summed over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x, group=self._group)
        return x

    def join(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """The slices of the vocabulary side by side."""
        if self.size == 1:
            return logits_BV
        parts = [torch.empty_like(logits_BV) for _ in range(self.size)]
        dist.all_gather(parts, logits_BV.contiguous(), group=self._group)
        return torch.cat(parts, -1)


def _mask(start: int, cache: Cache) -> torch.Tensor | None:
    """Which columns [B, 1, T, end] the new tokens may see; None where plain causality says it."""
    if cache.padding_B is None:
        return None
    columns_S = torch.arange(cache.end, device=cache.padding_B.device)
    rows_T = columns_S[start:, None]
    visible = (columns_S <= rows_T) & (columns_S >= cache.padding_B[:, None, None])
    # A padding column sees itself: some kernels turn a row that sees nothing into NaN, and NaN passes through masks.
    return (visible | (columns_S == rows_T)).unsqueeze(1)


def _require_dense(model: GPTModel) -> None:
    for number, layer in enumerate(cast(Any, model.decoder.layers)):
        attention, mlp = layer.self_attention, layer.mlp
        norms = (layer.input_layernorm, layer.pre_mlp_layernorm)
        fits = {
            "self_attention": type(attention) is RotaryAttention,
            "core_attention": type(attention.core_attention) is SDPACoreAttention,
            "q_layernorm": type(attention.q_layernorm) in (RMSNorm, IdentityOp),
            "k_layernorm": type(attention.k_layernorm) in (RMSNorm, IdentityOp),
            "mlp": type(mlp) is MLP,
            "layernorm": all(type(norm) is RMSNorm for norm in norms),
        }
        for name, fit in fits.items():
            if not fit:
                raise UnsupportedModel(
                    f"layer {number} has a {name} that the native engine does not know: it decodes models made by "
                    "build_model, with RMSNorm, SDPACoreAttention and a SwiGLU MLP"
                )
