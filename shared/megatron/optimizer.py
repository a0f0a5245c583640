"""AdamW for Megatron models under any layout: typed settings, parameter groups, and a fused step without Apex.

optimizer = build_optimizer(AdamWConfig(lr=3e-4), model_config, wrapped_chunks)      # Megatron's ChainedOptimizer
grad_norm = update(optimizer, lr=1e-4)                                               # clip and step
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any, cast

import torch
import torch.distributed as dist

from shared.experiment.contracts import AssayError
from shared.megatron.init import current_layout, quiet_imports


class BadOptimizerConfig(AssayError):
    """Optimizer settings outside their range, or a learning-rate scale that fits no parameter."""


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101) as Megatron runs it: biases and norms are not decayed.

    lr: peak learning rate; every step is given its own.
    decay_vectors: decay biases and norms too, as torch.optim.AdamW over all parameters does (the RL trainers' way).
    grad_clip: largest norm of the gradient of the whole model; 0 switches clipping off.
    lr_scale: prefix of parameter names -> factor on the learning rate of these parameters. Names are those of the whole
        model in one process, such as `embedding.` or `decoder.layers.3.`; no prefix may be the start of another.
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_vectors: bool = False
    grad_clip: float = 1.0
    lr_scale: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in (("weight_decay", self.weight_decay), ("grad_clip", self.grad_clip), ("lr", self.lr)):
            if value < 0:
                raise BadOptimizerConfig(f"{name}={value} is negative: choose 0 or more")
        for short, long in permutations(self.lr_scale, 2):
            if long.startswith(short):
                raise BadOptimizerConfig(
                    f"lr_scale: {short!r} and {long!r} both scale what starts with {long!r}: choose prefixes that "
                    "exclude each other"
                )


class FusedAdam(torch.optim.Optimizer):
    """AdamW on torch's fused kernel with the contract of Apex's FusedAdam: the step is counted per group.

    Same arithmetic as `torch.optim.AdamW(fused=True)`. `adam_w_mode` and `bias_correction` must be True.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
    ):
        if not (bias_correction and adam_w_mode):
            raise BadOptimizerConfig(
                "FusedAdam is AdamW with bias correction: leave adam_w_mode and bias_correction on"
            )
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bias_correction": True}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One update of all parameters that have a gradient; `closure` is not supported."""
        assert closure is None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            group["step"] = group.get("step", 0) + 1
            if params:
                self._step(group, params)

    def _step(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        states = [self.state[p] for p in params]
        step = torch.tensor(float(group["step"]), device=params[0].device)
        torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
            params,
            [cast(torch.Tensor, p.grad) for p in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [step] * len(params),
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )


def build_optimizer(config: AdamWConfig, chunks: Sequence[Any], names: Mapping[torch.Tensor, str]) -> Any:
    """Megatron's optimizer over this rank's `chunks`, wrapped by its DistributedDataParallel.

    `names` gives each parameter's name in the whole model. Raises `BadOptimizerConfig`.
    """
    with quiet_imports():
        from megatron.core.optimizer import OptimizerConfig, ParamKey, ParamPredicate, get_megatron_optimizer

    from shared.megatron.shim import construction

    _require_parameters(config.lr_scale, names.values())
    layout = current_layout()
    half = chunks[0].config.bf16
    megatron = OptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        adam_eps=config.eps,
        clip_grad=config.grad_clip,
        bf16=half,
        params_dtype=torch.bfloat16 if half else torch.float32,
        use_distributed_optimizer=layout.distributed_optimizer,
        overlap_param_gather=layout.overlap and layout.distributed_optimizer,
    )
    overrides: dict[Any, Any] = {}
    if not config.decay_vectors:
        # Norms and biases are the parameters with one dimension, and a bias is one by name as well.
        vectors = ParamKey(name="*.bias", predicate=ParamPredicate("vector", lambda p: p.dim() == 1))
        overrides[vectors] = {"wd_mult": 0.0}
    for prefix, scale in config.lr_scale.items():
        chosen = ParamPredicate(f"starts with {prefix}", lambda p, start=prefix: names[p].startswith(start))
        overrides[ParamKey(predicate=chosen)] = {"lr_mult": scale}
    with construction():
        optimizer: Any = get_megatron_optimizer(megatron, list(chunks), config_overrides=overrides)
    for group in optimizer.param_groups:
        # Megatron leaves this to its learning-rate scheduler, which we do not use.
        group["weight_decay"] = config.weight_decay * group["wd_mult"]
    for part in optimizer.chained_optimizers:
        part.init_state_fn(part.optimizer, part.config)
    return optimizer


def _require_parameters(prefixes: Iterable[str], names: Iterable[str]) -> None:
    own = {prefix for prefix in prefixes if any(name.startswith(prefix) for name in names)}
    found = [own] * dist.get_world_size()
    if prefixes:
        dist.all_gather_object(found, own)
    for prefix in set(prefixes).difference(*found):
        raise BadOptimizerConfig(f"lr_scale: no parameter starts with {prefix!r}: see model.named_parameters()")


def update(optimizer: Any, lr: float) -> float:
    """Clip the gradients and step with learning rate `lr`; returns the norm before clipping, equal on all ranks.

    If the norm is not finite, nothing is changed.
    """
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if not math.isfinite(norm):
        return norm
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_mult"]
    # As clip_grads.py:153, whose check of the gradient's type knows only CUDA.
    factor = optimizer.config.clip_grad / (norm + 1e-6)
    if 0 < factor < 1:
        gradients = [p.grad for part in optimizer.chained_optimizers for p in part.get_parameters()]
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(factor)
    optimizer.step_with_ready_grads()
    return norm
