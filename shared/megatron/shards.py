"""Whole weights into the tensor-parallel part of them that a rank holds.

    load_whole(model, load_weights("weights.safetensors"))      # names and shapes of a model built by one process

For weights of other origins see `shared.megatron.hf`; to change the layout of a training run, its checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from megatron.core import parallel_state
from torch import Tensor

from shared.experiment.contracts import AssayError


class WholeWeightsDoNotFit(AssayError):
    """Names or shapes that are not those of the same model in one process."""


@torch.no_grad()
def load_whole(model: torch.nn.Module, whole: Mapping[str, Tensor]) -> None:
    """Copy this tensor-parallel rank's slices of `whole` into the parameters of `model`.

    Raises `WholeWeightsDoNotFit`, before anything is copied.
    """
    parameters = dict(model.named_parameters())
    if parameters.keys() != whole.keys():
        missing, unknown = sorted(parameters.keys() - whole.keys()), sorted(whole.keys() - parameters.keys())
        raise WholeWeightsDoNotFit(f"missing {missing}, unknown {unknown}: load weights of the same architecture")
    slices = {name: _slice(name, whole[name], parameter) for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.copy_(slices[name])


def _slice(name: str, whole: Tensor, parameter: Tensor) -> Tensor:
    size = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    if whole.shape == parameter.shape:
        return whole
    for dim, (total, own) in enumerate(zip(whole.shape, parameter.shape, strict=False)):
        expected = (*parameter.shape[:dim], own * size, *parameter.shape[dim + 1 :])
        if total == own * size and tuple(whole.shape) == expected:
            # Gate and up projection are stacked, and each is split by itself.
            halves = whole.chunk(2) if name.endswith("linear_fc1.weight") else (whole,)
            return torch.cat([half.chunk(size, dim)[rank] for half in halves], dim)
    raise WholeWeightsDoNotFit(
        f"{name} has shape {tuple(whole.shape)}, and {size} ranks hold {tuple(parameter.shape)} each: load weights of "
        "the same architecture"
    )
