"""Models in Hugging Face format, in and out: folders under any layout, or state dicts in memory.

    model = import_hf("Qwen3-0.6B")                                # every rank reads its own slices
    export_hf(model, "out", tokenizer="Qwen3-0.6B")                # loads in transformers and vLLM
    model = from_hf(hf_model.config, hf_model.state_dict())        # dense models: transformers fuses experts in memory

Weights for training go into what exists already, and from there into its float32 main parameters:

    parallel = ParallelModel(hf_model_config("Qwen3-0.6B"), AdamWConfig(lr=1e-5), seed=0, precision="bf16")
    load_hf("Qwen3-0.6B", parallel.chunks)
    parallel.optimizer.reload_model_params()

Llama, Qwen2, Qwen3, Qwen3-MoE and Mixtral. Neither direction holds more than a tensor beside the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from shared.experiment.contracts import AssayError
from shared.megatron.config import ModelConfig
from shared.megatron.hf_config import DamagedFiles, UnsupportedArchitecture, config_from_hf, hf_config, read_config
from shared.megatron.hf_export import ExportNotWritten, export_hf, to_hf_state_dict
from shared.megatron.hf_files import DTYPES, SafetensorsFolder
from shared.megatron.hf_names import EMBEDDING, HEAD, held, whole_tensors
from shared.megatron.hf_tokenizer import TokenizerDoesNotFit, Vocabulary
from shared.megatron.init import current_layout, initialize
from shared.megatron.layout import ImpossibleLayout
from shared.megatron.model import build_chunks, config_of

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from transformers import PretrainedConfig

__all__ = [
    "DamagedFiles",
    "ExportNotWritten",
    "TokenizerDoesNotFit",
    "UnsupportedArchitecture",
    "WeightsDoNotFit",
    "config_from_hf",
    "export_hf",
    "from_hf",
    "hf_model_config",
    "import_hf",
    "load_hf",
    "to_hf_config",
    "to_hf_state_dict",
]

COPY_BYTES = 4 << 20
_NAMES_SHOWN = 5
# What a model may have otherwise than the weights that it loads.
_FREE = ("max_sequence_length", "init_std", "aux_loss_coeff")


class WeightsDoNotFit(AssayError):
    """Weights lack tensors, have unknown ones, or have one of another shape or kind than the model."""


def import_hf(
    path: str | Path, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> GPTModel:
    """This rank's part of the model in the folder `path`, under the layout that `initialize` set up.

    dtype: of the parameters; None keeps that of the files (float32, bfloat16 or float16).
    Configuration, names, shapes, sizes of files and the tokenizer's vocabulary are checked before memory is taken.

    Raises `UnsupportedArchitecture`, `DamagedFiles`, `WeightsDoNotFit`, `TokenizerDoesNotFit`, and `ImpossibleLayout`
    where the layout does not divide the model or gives a rank several chunks (use `build_chunks` and `load_hf`).
    """
    initialize(device)
    if current_layout().virtual_pp > 1:
        raise ImpossibleLayout("virtual_pp > 1 gives every rank several models: call build_chunks, then load_hf")
    config, files = _open(Path(path))
    current_layout().check_model(config)
    (model,) = build_chunks(config, None, device, dtype=dtype or _one_dtype(files))
    _fill([model], config, files.read)
    return model


def hf_model_config(path: str | Path) -> ModelConfig:
    """Sizes of the model in a folder. Raises `DamagedFiles` or `UnsupportedArchitecture`."""
    return config_from_hf(read_config(Path(path)))


def load_hf(path: str | Path, chunks: Sequence[GPTModel]) -> None:
    """Load the weights of the folder `path` into existing chunks, whatever their layout and dtype.

    Raises what `import_hf` raises, before anything is changed; also `WeightsDoNotFit` for another architecture.
    """
    config, files = _open(Path(path))
    own = config_of(chunks[0])
    differ = [f"{name}={theirs!r} instead of {ours!r}" for name, theirs, ours in _differences(config, own)]
    if differ:
        raise WeightsDoNotFit(f"{path} has {', '.join(differ)}: build the model from hf_model_config")
    _fill(chunks, own, files.read)


def from_hf(
    config: PretrainedConfig, state_dict: Mapping[str, torch.Tensor], device: torch.device | str | None = None
) -> GPTModel:
    """A float32 model with the weights of a Hugging Face `state_dict`, all of them and no others.

    Experts have to be named as in files, one tensor each. Raises `UnsupportedArchitecture` or `WeightsDoNotFit`.
    """
    own = config_from_hf(config)
    found = {name: (tuple(tensor.shape), str(tensor.dtype)) for name, tensor in state_dict.items()}
    _check(own, found, {str(dtype) for dtype in (*DTYPES.values(), torch.float64)})
    if own.tie_embeddings and HEAD in state_dict and not torch.equal(state_dict[HEAD], state_dict[EMBEDDING]):
        raise WeightsDoNotFit(_DIFFERENT_HEAD)
    (model,) = build_chunks(own, None, device)
    _fill([model], own, lambda name, region: state_dict[name][region])
    return model


def to_hf_config(model: GPTModel) -> PretrainedConfig:
    """Configuration of transformers for `model`, token ids None. Raises `UnsupportedArchitecture`."""
    return hf_config(config_of(model))


_DIFFERENT_HEAD = "lm_head.weight differs from the embedding though tie_word_embeddings=True: set it False"


def _open(folder: Path) -> tuple[ModelConfig, SafetensorsFolder]:
    config = hf_model_config(folder)
    files = SafetensorsFolder(folder)
    _check(config, {name: (shape, files.dtypes[name]) for name, shape in files.shapes.items()}, set(DTYPES))
    if any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        Vocabulary(folder).check(config.vocab_size)
    if config.tie_embeddings and HEAD in files.shapes:
        for rows in _blocks(config.vocab_size, config.hidden_size * 4):
            head = files.read(HEAD, (rows, slice(None))).clone()
            if not torch.equal(head, files.read(EMBEDDING, (rows, slice(None)))):
                raise WeightsDoNotFit(_DIFFERENT_HEAD)
    return config, files


def _one_dtype(files: SafetensorsFolder) -> torch.dtype:
    kinds = set(files.dtypes.values())
    if len(kinds) > 1:
        raise WeightsDoNotFit(f"{files.folder} mixes {', '.join(sorted(kinds))}: choose one with dtype=")
    return DTYPES[kinds.pop()]


def _differences(theirs: ModelConfig, ours: ModelConfig) -> Iterator[tuple[str, Any, Any]]:
    if theirs.moe and ours.moe:
        aligned = replace(ours.moe, aux_loss_coeff=theirs.moe.aux_loss_coeff)
        ours = replace(ours, moe=aligned, ffn_hidden_size=theirs.ffn_hidden_size)
    for field in fields(ModelConfig):
        a, b = getattr(theirs, field.name), getattr(ours, field.name)
        if a != b and field.name not in _FREE:
            yield field.name, a, b


def _check(config: ModelConfig, found: Mapping[str, tuple[tuple[int, ...], str]], dtypes: set[str]) -> None:
    """Names, shapes and kinds of the tensors of a whole model. Raises `WeightsDoNotFit`."""
    expected = {tensor.name: tensor.shape for tensor in whole_tensors(config)}
    if config.tie_embeddings and HEAD in found:
        expected[HEAD] = expected[EMBEDDING]
    # Older Llama files hold the rotary frequencies, which follow from the configuration.
    names = {name for name in found if not name.endswith(".rotary_emb.inv_freq")}
    if names != expected.keys():
        missing, unknown = sorted(expected.keys() - names), sorted(names - expected.keys())
        raise WeightsDoNotFit(
            f"missing {_some(missing)}, unknown {_some(unknown)}: check that config and weights belong together"
        )
    for name, shape in expected.items():
        if found[name][0] != shape or found[name][1] not in dtypes:
            raise WeightsDoNotFit(
                f"{name} is {found[name][1]} of shape {found[name][0]}, expected floats of shape {shape}: check that "
                "config and weights belong together"
            )


def _some(names: list[str]) -> str:
    return f"{names[:_NAMES_SHOWN]}" + (f" and {len(names) - _NAMES_SHOWN} more" if names[_NAMES_SHOWN:] else "")


def _blocks(rows: int, row_bytes: int) -> Iterator[slice]:
    step = max(1, COPY_BYTES // row_bytes)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


@torch.no_grad()
def _fill(
    chunks: Sequence[GPTModel], config: ModelConfig, read: Callable[[str, tuple[slice, ...]], torch.Tensor]
) -> None:
    """Copy this rank's regions, a few rows of a view at a time."""
    for piece in held(chunks, config):
        view, (first, *rest) = piece.view, piece.region
        per_index = piece.shape[0] // len(view)
        for rows in _blocks(len(view), view[0].numel() * view.element_size()):
            start, stop = (first.start + row * per_index for row in (rows.start, rows.stop))
            view[rows].copy_(read(piece.tensor.name, (slice(start, stop), *rest)).reshape(view[rows].shape))
