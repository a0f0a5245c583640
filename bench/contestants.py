"""The models that are compared, each behind one function: tokens and labels in, loss out, one step of training taken.

Imported only by the measurements: it loads torch, Megatron and transformers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.minimal import MinimalLlama
from bench.shapes import BETAS, GRAD_CLIP, LR, WEIGHT_DECAY
from shared.megatron.config import ModelConfig
from shared.megatron.fused import cross_entropy_
from shared.megatron.hf import to_hf_config, to_hf_state_dict
from shared.megatron.model import build_model, forward_logits
from shared.megatron.optimizer import AdamWConfig
from shared.megatron.parallel import Microbatch, ParallelModel

ADAMW = AdamWConfig(lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, decay_vectors=True, grad_clip=GRAD_CLIP)
Step = Callable[[Tensor, Tensor], float]
"""(tokens_BT, labels_BT), both int64 -> loss before the step, in nats per token."""


def contestants(config: ModelConfig) -> dict[str, Step]:
    """Name -> training step, all from the weights of `build_model(config, seed=0)`."""
    return {name: make(config) for name, make in MAKERS.items()}


def assay(config: ModelConfig) -> Step:
    """GPTModel in one process with torch's AdamW, and the cross-entropy of the warm start."""
    model = build_model(config, seed=0, device="cpu")

    def loss(tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        return cross_entropy_(forward_logits(model, tokens_BT).flatten(0, 1), labels_BT.flatten(), "mean")

    return torch_step(model, loss)


def assay_parallel(config: ModelConfig) -> Step:
    """ParallelModel at world size 1, with Megatron's optimizer."""
    model = ParallelModel(config, ADAMW, seed=0, device="cpu")

    def step(tokens_BT: Tensor, labels_BT: Tensor) -> float:
        batch = Microbatch(tokens_BT, labels_BT, torch.ones(tokens_BT.shape))
        return model.train_step([batch], LR).loss

    return step


def transformers_llama(config: ModelConfig) -> Step:
    """LlamaForCausalLM with torch's SDPA."""
    from transformers import AutoModelForCausalLM

    ours = build_model(config, seed=0, device="cpu")
    model = AutoModelForCausalLM.from_config(to_hf_config(ours), attn_implementation="sdpa", dtype=torch.float32)
    _load(model, to_hf_state_dict(ours))
    model.train()
    return torch_step(model, torch_loss(lambda tokens_BT: model(input_ids=tokens_BT, use_cache=False).logits))


def _load(model: nn.Module, state: dict[str, Tensor]) -> None:
    missing, unknown = model.load_state_dict(state, strict=False)
    if unknown or set(missing) - {"lm_head.weight"}:  # a tied head has no entry
        raise ValueError(f"weights do not fit: missing {missing}, unknown {unknown}")


def minimal(config: ModelConfig) -> Step:
    """The hand-written Llama."""
    model = MinimalLlama(config)
    model.load_hf(to_hf_state_dict(build_model(config, seed=0, device="cpu")))
    return torch_step(model, torch_loss(model))


def torch_loss(logits: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """torch's cross-entropy of a model's logits."""
    return lambda tokens_BT, labels_BT: F.cross_entropy(logits(tokens_BT).flatten(0, 1), labels_BT.flatten())


def torch_step(model: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor]) -> Step:
    """Forward, cross-entropy, backward, clipping, fused AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)

    def step(tokens_BT: Tensor, labels_BT: Tensor) -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(tokens_BT, labels_BT)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()
        return loss.item()

    return step


MAKERS: dict[str, Callable[[ModelConfig], Step]] = {
    "assay": assay,
    "assay-parallel": assay_parallel,
    "transformers": transformers_llama,
    "minimal": minimal,
}
