"""The layers of the decoder: Megatron's local modules, with attention, norm and rotary table of ours.

Megatron's own choices do not fit one process on a CPU: its local attention stores an s x s mask, repeats K and V for
grouped queries and refuses context parallelism, its torch norm refuses sequence parallelism, its rotary table asks
CUDA for a device. Activations are [sequence, batch, hidden] throughout, as in Megatron.

Under context parallelism of size n a sequence is cut into 2n chunks, and rank r holds chunks r and 2n - 1 - r, so that
causal attention costs every rank the same.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F

from shared.experiment.contracts import AssayError
from shared.megatron.config import ModelConfig
from shared.megatron.fused import Rotate, SplitRotate, swiglu
from shared.megatron.init import quiet_imports

with quiet_imports():
    from megatron.core import parallel_state
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules


class SequenceTooLong(AssayError):
    """A sequence does not fit into the model's rotary table."""


class CausalOnly(AssayError):
    """The attention was given a mask, a bias or packed sequences."""


class NoTransformerEngine(AssayError):
    """`backend="te"` without Transformer Engine."""


def zigzag(x: torch.Tensor, dim: int) -> torch.Tensor:
    """The part of `x` that this context-parallel rank holds: two of 2n chunks along `dim`. `x` itself if n is 1."""
    size = parallel_state.get_context_parallel_world_size()
    if size <= 1:
        return x
    rank = parallel_state.get_context_parallel_rank()
    chunks = x.chunk(2 * size, dim)
    return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]), dim)


def gather_zigzag(x: torch.Tensor) -> torch.Tensor:
    """The whole sequence, in order along dimension 0, from every rank's part; the gradient is summed over the ranks."""
    size = parallel_state.get_context_parallel_world_size()
    group = parallel_state.get_context_parallel_group()
    parts = gather_from_sequence_parallel_region(x.contiguous(), group=group).unflatten(0, (size, 2, -1))
    return torch.cat((parts[:, 0].flatten(0, 1), parts[:, 1].flip(0).flatten(0, 1)))


class RMSNorm(torch.nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich, arXiv:1910.07467, eq. 4)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Megatron sums the gradients of parameters marked so over the tensor-parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape and dtype of `x` are kept."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class RotaryTable(RotaryEmbedding):
    """Rotary angles of all positions, computed once and kept on the model's device, outside its state dict."""

    freqs_T11D: torch.Tensor

    def __init__(self, head_dim: int, base: float, max_sequence_length: int):
        super().__init__(head_dim, rotary_percent=1.0, rotary_base=base, use_cpu_initialization=True)  # pyright: ignore[reportArgumentType]
        freqs_TE = self.get_freqs_non_repeated(max_sequence_length)
        self.register_buffer("freqs_T11D", torch.cat((freqs_TE, freqs_TE), -1)[:, None, None], persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> RotaryTable:
        # Moves between devices, but stays float32: bfloat16 has no odd positions above 256.
        freqs = self.freqs_T11D
        super()._apply(fn, recurse)
        if self.freqs_T11D.dtype != freqs.dtype:
            self.freqs_T11D = freqs.to(self.freqs_T11D.device)
        return self

    def forward(self, max_seq_len: int, offset: int = 0, **_: Any) -> torch.Tensor:
        """Angles [max_seq_len, 1, 1, head_dim] in radians, float32; under context parallelism this rank's part of them.

        `max_seq_len` is the length of the whole sequence. Raises `SequenceTooLong`.
        """
        limit = self.freqs_T11D.shape[0]
        if offset + max_seq_len > limit:
            raise SequenceTooLong(
                f"{offset + max_seq_len} positions do not fit into max_sequence_length={limit}: "
                "shorten the sequences, or build the model with a larger max_sequence_length"
            )
        return zigzag(self.freqs_T11D[offset : offset + max_seq_len], 0)


class Column(ColumnParallelLinear):
    """Megatron's column-parallel linear layer; whole and without bias, it is torch's, for half the calls."""

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """[..., in] -> ([..., out of this rank], None or bias)."""
        if whole(self) and not (args or kwargs):
            return F.linear(input_, cast(torch.Tensor, self.weight)), None
        return super().forward(input_, *args, **kwargs)


class Row(RowParallelLinear):
    """Megatron's row-parallel linear layer; whole and without bias, it is torch's."""

    def forward(self, input_: torch.Tensor) -> Any:
        """[..., in of this rank] -> ([..., out], None)."""
        return (F.linear(input_, self.weight), None) if whole(self) else super().forward(input_)


def whole(layer: Any) -> bool:
    """Whether one rank holds all of a linear layer that has no bias."""
    return layer.bias is None and layer.config.tensor_model_parallel_size == 1


class RotaryAttention(SelfAttention):
    """Megatron's self-attention; plain causal training takes a short path with a cheaper rotation."""

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        """[s, b, h] -> ([s, b, h], bias), see megatron.core.transformer.attention.Attention.forward."""
        freqs = kwargs.get("rotary_pos_emb")
        cached = kwargs.get("inference_context") is not None or kwargs.get("packed_seq_params") is not None
        if freqs is None or cached or self.checkpoint_core_attention:
            return super().forward(hidden_states, attention_mask, **kwargs)
        cos, sin = freqs.cos().to(hidden_states.dtype), freqs.sin().to(hidden_states.dtype)
        if isinstance(self.q_layernorm, IdentityOp):
            mixed, _ = cast(Any, self.linear_qkv)(hidden_states)
            groups = self.num_query_groups_per_partition
            mixed = mixed.unflatten(-1, (groups, -1, self.hidden_size_per_attention_head))
            query, key, value = SplitRotate.apply(mixed, cos, sin)
        else:
            query, key, value = cast(tuple[torch.Tensor, ...], self.get_query_key_value_tensors(hidden_states))
            query, key = Rotate.apply(query, cos, sin), Rotate.apply(key, cos, sin)
        return self.linear_proj(cast(Any, self.core_attention)(query, key, value, attention_mask))


class SDPACoreAttention(torch.nn.Module):
    """Scaled dot-product attention on torch's fused kernel, with grouped queries and without a stored mask."""

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any):
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Causal attention of [sq, b, heads, d] queries over [sk, b, groups, d] keys and values -> [sq, b, heads * d].

        With sq < sk (the first sk - sq positions came from a cache) query i sees keys 0 .. sk - sq + i. Under context
        parallelism keys and values are gathered, and each of the two query chunks sees those up to its own. Masks
        raise `CausalOnly`: under causality, padding on the right is invisible to every real token.
        """
        if attention_mask is not None or attention_bias is not None or packed_seq_params is not None:
            raise CausalOnly("SDPACoreAttention is causal only: pass None for mask, bias and packed sequences")
        size = parallel_state.get_context_parallel_world_size()
        if size <= 1:
            return self._attend(query, key, value)
        key, value = gather_zigzag(key), gather_zigzag(value)
        early, late = query.chunk(2)
        rank, chunk = parallel_state.get_context_parallel_rank(), len(early)
        ends = ((early, (rank + 1) * chunk), (late, (2 * size - rank) * chunk))
        return torch.cat([self._attend(part, key[:end], value[:end]) for part, end in ends])

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        length_q, batch, heads, _ = query.shape
        length_k = key.shape[0]
        mask = None
        if 1 < length_q < length_k:
            mask = torch.ones(length_q, length_k, dtype=torch.bool, device=query.device).tril(length_k - length_q)
        out_BHSD = F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=mask,
            is_causal=length_q == length_k,
            scale=self.softmax_scale,
            enable_gqa=key.shape[2] != heads,
        )
        return out_BHSD.permute(2, 0, 1, 3).reshape(length_q, batch, -1)


def layer_spec(config: ModelConfig, backend: Literal["local", "te"]) -> ModuleSpec:
    """One pre-norm layer of grouped-query attention and SwiGLU, or experts where `config.moe` is set.

    backend: "local" is Megatron's own linear layers with the attention and norm of this file, "te" is Megatron's
        Transformer Engine layer as it stands (not run on a GPU yet). Raises `NoTransformerEngine`.
    """
    spec = _te_layer(config) if backend == "te" else _local_layer(config)
    if config.moe:
        from shared.moe.layer import MoELayer

        cast(Any, spec.submodules).mlp = ModuleSpec(module=MoELayer, params={"moe": config.moe})
    return spec


def _te_layer(config: ModelConfig) -> ModuleSpec:
    from megatron.core.models.gpt import gpt_layer_specs

    if not gpt_layer_specs.HAVE_TE:
        raise NoTransformerEngine(
            'backend="te" needs Transformer Engine: pip install "transformer-engine[pytorch]" (CUDA only), or use '
            'backend="local"'
        )
    return gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
        # A dense layer has its second norm inside the MLP, which experts replace.
        num_experts=config.moe.num_experts if config.moe else None,
        qk_layernorm=config.qk_layernorm,
    )


def _local_layer(config: ModelConfig) -> ModuleSpec:
    qk_norm = RMSNorm if config.qk_layernorm else IdentityOp
    attention = SelfAttentionSubmodules(
        linear_qkv=Column,
        core_attention=cast(Any, SDPACoreAttention),
        linear_proj=Row,
        q_layernorm=qk_norm,
        k_layernorm=qk_norm,
    )
    layer = TransformerLayerSubmodules(
        input_layernorm=RMSNorm,
        self_attention=ModuleSpec(
            module=RotaryAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
        ),
        self_attn_bda=cast(Any, get_bias_dropout_add),
        pre_mlp_layernorm=RMSNorm,
        mlp=ModuleSpec(
            module=MLP,
            submodules=MLPSubmodules(linear_fc1=Column, linear_fc2=Row, activation_func=cast(Any, swiglu)),
        ),
        mlp_bda=cast(Any, get_bias_dropout_add),
        # Transformer Engine's names for the norms, so that distributed checkpoints fit both kinds of layer.
        sharded_state_dict_keys_map={"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
        | ({} if config.moe else {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}),
    )
    return ModuleSpec(module=TransformerLayer, submodules=layer)


def decoder_spec(layer: ModuleSpec, num_layers: int, backend: Literal["local", "te"]) -> TransformerBlockSubmodules:
    """`num_layers` equal layers and the final norm, which Megatron builds on the last pipeline stage only."""
    norm = RMSNorm
    if backend == "te":
        from megatron.core.extensions.transformer_engine import TENorm

        norm = TENorm
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=cast(Any, norm))
