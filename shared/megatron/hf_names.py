"""Which part of which Megatron parameter is which Hugging Face tensor: one table for import and export, any layout.

    whole_tensors(config)                # every tensor of the files: name, shape, how it is dealt out
    held(chunks, config)                 # what this rank holds of them, as views into its parameters

Rotary positions need no permutation: both sides rotate halves. Experts have a tensor each, as in the hub's files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from shared.megatron.config import ModelConfig
from shared.megatron.hf_config import UnsupportedArchitecture, architecture

if TYPE_CHECKING:
    import torch
    from megatron.core.models.gpt import GPTModel

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
# With Transformer Engine these norms live in the linear layer that follows them.
_FUSED_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


@dataclass(frozen=True)
class Whole:
    """A tensor of the files. `split` is the dimension dealt out to the tensor-parallel ranks, None if each has all.

    `parameter` is Megatron's name, inside layer `layer` where there is one; `view` makes the view that holds the
    tensor, whose dimensions flatten to the tensor's. `expert` counts over all expert-parallel ranks.
    """

    name: str
    shape: tuple[int, ...]
    split: int | None
    parameter: str
    view: Callable[[torch.Tensor], torch.Tensor] = lambda parameter: parameter
    layer: int | None = None
    expert: int | None = None

    def region(self, part: int, parts: int) -> tuple[slice, ...]:
        """Where part number `part` of `parts` equal ones lies, along `split`."""
        ends = [slice(0, length) for length in self.shape]
        if self.split is not None:
            own = self.shape[self.split] // parts
            ends[self.split] = slice(part * own, (part + 1) * own)
        return tuple(ends)


@dataclass(frozen=True)
class Held:
    """Part number `part` of a Hugging Face tensor, as a view into a parameter of this rank; 0 if it is not split."""

    tensor: Whole
    part: int
    region: tuple[slice, ...]
    view: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the region."""
        return tuple(part.stop - part.start for part in self.region)


def whole_tensors(config: ModelConfig) -> list[Whole]:
    """Every tensor of a model of this shape, in the order of its layers. Raises `UnsupportedArchitecture`."""
    architecture(config)
    matrix = (config.vocab_size, config.hidden_size)
    tensors = [Whole(EMBEDDING, matrix, 0, "embedding.word_embeddings.weight")]
    for layer in range(config.num_layers):
        tensors += _attention(config, layer)
        tensors += _experts(config, layer) if config.moe else _dense(config, layer)
    tensors += [Whole("model.norm.weight", (config.hidden_size,), None, "decoder.final_layernorm.weight")]
    return tensors if config.tie_embeddings else [*tensors, Whole(HEAD, matrix, 0, "output_layer.weight")]


def _attention(config: ModelConfig, layer: int) -> Iterator[Whole]:
    hidden, prefix = config.hidden_size, f"model.layers.{layer}"
    queries = config.num_attention_heads // config.num_query_groups

    def heads(part: slice) -> Callable[[torch.Tensor], torch.Tensor]:
        # Megatron's order: in every group the queries, then one key, one value.
        return lambda qkv: qkv.unflatten(0, (-1, queries + 2, config.head_dim))[:, part]

    yield Whole(f"{prefix}.input_layernorm.weight", (hidden,), None, "input_layernorm.weight", layer=layer)
    for name, part in (
        ("q_proj", slice(0, queries)),
        ("k_proj", slice(queries, queries + 1)),
        ("v_proj", slice(queries + 1, queries + 2)),
    ):
        rows = (part.stop - part.start) * config.num_query_groups * config.head_dim
        own = f"{prefix}.self_attn.{name}"
        yield Whole(f"{own}.weight", (rows, hidden), 0, "self_attention.linear_qkv.weight", heads(part), layer)
        if config.qkv_bias:
            yield Whole(f"{own}.bias", (rows,), 0, "self_attention.linear_qkv.bias", heads(part), layer)
    columns = config.num_attention_heads * config.head_dim
    projection = "self_attention.linear_proj.weight"
    yield Whole(f"{prefix}.self_attn.o_proj.weight", (hidden, columns), 1, projection, layer=layer)
    if config.qk_layernorm:
        for name in ("q", "k"):
            norm = f"self_attention.{name}_layernorm.weight"
            yield Whole(f"{prefix}.self_attn.{name}_norm.weight", (config.head_dim,), None, norm, layer=layer)
    name = f"{prefix}.post_attention_layernorm.weight"
    yield Whole(name, (hidden,), None, "pre_mlp_layernorm.weight", layer=layer)


def _dense(config: ModelConfig, layer: int) -> Iterator[Whole]:
    inner, hidden, prefix = config.ffn_hidden_size, config.hidden_size, f"model.layers.{layer}.mlp"
    fc1, fc2 = "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"
    yield Whole(f"{prefix}.gate_proj.weight", (inner, hidden), 0, fc1, lambda both: both.chunk(2)[0], layer)
    yield Whole(f"{prefix}.up_proj.weight", (inner, hidden), 0, fc1, lambda both: both.chunk(2)[1], layer)
    yield Whole(f"{prefix}.down_proj.weight", (hidden, inner), 1, fc2, layer=layer)


def _experts(config: ModelConfig, layer: int) -> Iterator[Whole]:
    assert config.moe is not None
    inner, hidden = config.moe.moe_ffn_hidden_size, config.hidden_size
    mixtral = architecture(config) == "mixtral"
    prefix = f"model.layers.{layer}.{'block_sparse_moe' if mixtral else 'mlp'}"
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    fc1, fc2 = "mlp.experts.fc1", "mlp.experts.fc2"
    experts = config.moe.num_experts
    yield Whole(f"{prefix}.gate.weight", (experts, hidden), None, "mlp.router.weight", layer=layer)
    for expert in range(experts):
        own = f"{prefix}.experts.{expert}"
        both, one = (inner, hidden), (hidden, inner)
        yield Whole(f"{own}.{gate}.weight", both, None, fc1, lambda w: w.chunk(2)[0], layer, expert)
        yield Whole(f"{own}.{up}.weight", both, None, fc1, lambda w: w.chunk(2)[1], layer, expert)
        yield Whole(f"{own}.{down}.weight", one, None, fc2, layer=layer, expert=expert)


def held(chunks: Sequence[GPTModel], config: ModelConfig) -> list[Held]:
    """What this rank holds, under the layout that its process groups have.

    Ranks that hold the same region each list it: data-parallel ones, and with tied embeddings the last pipeline stage,
    which has a copy of the embedding for the logits. Raises `UnsupportedArchitecture` if a parameter, or a part of
    one, has no place in the files.
    """
    from megatron.core import parallel_state

    size = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    first_expert = 0
    if config.moe:
        own = config.moe.num_experts // parallel_state.get_expert_model_parallel_world_size()
        first_expert = own * parallel_state.get_expert_model_parallel_rank()
    tensors = whole_tensors(config)
    pieces = []
    for chunk in chunks:
        parameters = _parameters(chunk)
        left = {key: parameter.numel() for key, parameter in parameters.items()}
        for tensor in tensors:
            key = _key(tensor, parameters)
            parameter = parameters.get(key)
            if parameter is not None and tensor.expert is not None:
                local = tensor.expert - first_expert
                parameter = parameter[local] if 0 <= local < len(parameter) else None
            if parameter is not None:
                part = 0 if tensor.split is None else rank
                pieces.append(Held(tensor, part, tensor.region(rank, size), tensor.view(parameter)))
                left[key] -= pieces[-1].view.numel()
        if config.tie_embeddings and chunk.post_process and not chunk.pre_process:
            copy = parameters[None, "output_layer.weight"]
            pieces.append(Held(tensors[0], rank, tensors[0].region(rank, size), copy))
            left[None, "output_layer.weight"] -= copy.numel()
        _require_nothing(left)
    return pieces


def _key(tensor: Whole, parameters: dict[tuple[int | None, str], torch.Tensor]) -> tuple[int | None, str]:
    fused = (tensor.layer, _FUSED_NORMS.get(tensor.parameter, ""))
    return fused if fused in parameters else (tensor.layer, tensor.parameter)


def _parameters(chunk: GPTModel) -> dict[tuple[int | None, str], torch.Tensor]:
    """(index of the layer in the whole model or None, name in there) -> parameter."""
    inside = "decoder.layers."
    parameters: dict[tuple[int | None, str], torch.Tensor] = {
        (None, name): parameter for name, parameter in chunk.named_parameters() if not name.startswith(inside)
    }
    for layer in cast(Any, chunk.decoder).layers:
        parameters |= {(layer.layer_number - 1, name): parameter for name, parameter in layer.named_parameters()}
    return parameters


def _require_nothing(left: dict[tuple[int | None, str], int]) -> None:
    names = [name if layer is None else f"{name} of layer {layer}" for (layer, name), count in left.items() if count]
    if names:
        raise UnsupportedArchitecture(
            f"{names[0]} (and {len(names) - 1} more) has no place in a Hugging Face file: only models as build_model "
            "makes them can be read and written"
        )
