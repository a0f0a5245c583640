"""The policy being trained: model, optimiser, and the updates of one rollout under any rule.

learner = Learner(config, model)
metrics = learner.update(batch, seed=0, rollout=3)      # epochs x minibatches optimiser steps
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.experiment.contracts import NonFinite
from shared.megatron.model import forward_logits
from shared.rl.aggregate import Denominators
from shared.rl.config import RLConfig
from shared.rl.inputs import LossInputs
from shared.rl.losses import MAX_LOG_RATIO
from shared.rl.mechanism import Observer
from shared.rl.metrics import Meter, clip_metrics, entropy_and_surplus, gap_summary, ratio_summary
from shared.rl.pipeline import policy_loss
from shared.rl.rollout import RolloutBatch

_FORWARD_ROWS = 128


def response_logits(model, batch: RolloutBatch, temperature: float) -> Tensor:
    """logits_BTV that score the response tokens, divided by the temperature. Position i scores token i + 1."""
    logits_BLV = forward_logits(model, batch.tokens_BL[:, :-1])
    width = batch.mask_BT.shape[1]
    first = int(batch.prompt_len_B[0]) - 1
    one_length = bool((batch.prompt_len_B == first + 1).all())
    if one_length and first + width <= logits_BLV.shape[1]:
        logits_BTV = logits_BLV[:, first : first + width]
    else:
        index_BT = batch.prompt_len_B[:, None] - 1 + torch.arange(width, device=logits_BLV.device)
        index_BT = index_BT.clamp_max(logits_BLV.shape[1] - 1)
        logits_BTV = logits_BLV.gather(1, index_BT[..., None].expand(-1, -1, logits_BLV.shape[-1]))
    return logits_BTV if temperature == 1.0 else logits_BTV / temperature


class Learner:
    """Holds the model and its optimiser; knows nothing of where batches come from."""

    def __init__(self, config: RLConfig, model) -> None:
        self.config, self.model = config, model
        self.optimizer, self._peak = _optimizer(config, model)
        self.device = next(model.parameters()).device
        self.updates = 0
        self._observe: Observer | None = None

    def state(self) -> dict[str, Any]:
        """Tensors and plain values that `load` restores exactly."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "updates": self.updates}

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates = state["updates"]

    @torch.no_grad()
    def score(self, batch: RolloutBatch) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of every response token, (B, T), 0 on padding."""
        parts, batch = [], batch.to(self.device)
        for rows in torch.arange(len(batch)).split(_FORWARD_ROWS):
            part = batch.rows(rows)
            logp_BTV = response_logits(self.model, part, self.config.temperature).log_softmax(-1)
            logp_BT = logp_BTV.gather(-1, part.response_BT[..., None]).squeeze(-1)
            entropy_BT = -(logp_BTV.exp() * logp_BTV).sum(-1)
            parts.append((logp_BT * part.mask_BT, entropy_BT * part.mask_BT))
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def update(
        self, batch: RolloutBatch, *, seed: int, rollout: int, observe: Observer | None = None
    ) -> dict[str, float]:
        """All optimiser steps of one rollout; returns its metrics (docs/metrics.md).

        Raises NonFinite, before the step is taken, if the loss or the gradient norm of a mini-batch is not finite.
        """
        batch = batch.to(self.device)
        logp_old_BT, entropy_old_BT = self.score(batch)
        valid_BT = batch.mask_BT.bool()
        meter, ratios, norms = Meter(), [], []
        self._observe = observe
        for epoch in range(self.config.epochs):
            for part, index in enumerate(self._minibatches(len(batch), seed, rollout, epoch)):
                where = f"rollout {rollout}, epoch {epoch}, mini-batch {part}"
                ratio_N, norm = self._step(batch.rows(index), logp_old_BT[index], entropy_old_BT[index], meter, where)
                ratios.append(ratio_N)
                norms.append(norm)
        return {
            "entropy": float(entropy_old_BT.sum() / valid_BT.sum()),
            **gap_summary(logp_old_BT[valid_BT], batch.logp_rollout_BT[valid_BT]),
            **meter.means(),
            **ratio_summary(torch.cat(ratios)),
            "grad_norm": float(np.mean(norms)),
            "grad_norm_max": float(np.max(norms)),
        }

    def _minibatches(self, rows: int, seed: int, rollout: int, epoch: int) -> list[Tensor]:
        groups_G = np.random.default_rng([seed, 13, rollout, epoch]).permutation(rows // self.config.samples)
        parts = np.array_split(groups_G, self.config.minibatches)
        offsets_N = np.arange(self.config.samples)
        return [torch.from_numpy((p[:, None] * self.config.samples + offsets_N).ravel()) for p in parts if len(p)]

    def _step(self, batch, logp_old_BT, entropy_old_BT, meter: Meter, where: str) -> tuple[Tensor, float]:
        c = self.config
        logp_BTV = response_logits(self.model, batch, c.temperature).log_softmax(-1)
        logp_BT = logp_BTV.gather(-1, batch.response_BT[..., None]).squeeze(-1)
        adv_BT = batch.advantages_B[:, None].expand_as(logp_BT)
        entropy_BT = -(logp_BTV.exp() * logp_BTV).sum(-1) if c.terms.entropy_coef else None
        inputs = LossInputs(
            logp_BT,
            logp_old_BT,
            adv_BT,
            batch.mask_BT,
            entropy_BT,
            entropy_old_BT,
            logp_rollout_BT=batch.logp_rollout_BT,
        )
        denominators = Denominators.of(batch.mask_BT, norm=float(len(batch) * c.task.max_response_len))
        result = policy_loss(inputs, c.loss, c.terms, denominators, positive_B=batch.reward_B == 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        result.loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), c.optimizer.grad_clip))
        if not (np.isfinite(float(result.loss.detach())) and np.isfinite(norm)):
            raise NonFinite(f"loss {float(result.loss.detach())} and gradient norm {norm} at {where}")
        ratio_N = self._measure(batch, inputs, logp_BTV.detach(), result, meter)
        self._schedule()
        self.optimizer.step()
        self.updates += 1
        return ratio_N, norm

    def _schedule(self) -> None:
        per_rollout = self.config.epochs * self.config.minibatches
        warmup = max(1, self.config.optimizer.warmup_rollouts * per_rollout)
        scale = min(1.0, (self.updates + 1) / warmup)
        for group, peak in zip(self.optimizer.param_groups, self._peak, strict=True):
            group["lr"] = peak * scale

    @torch.no_grad()
    def _measure(self, batch, inputs: LossInputs, logp_BTV: Tensor, result, meter: Meter) -> Tensor:
        valid_BT = batch.mask_BT.bool()
        _, surplus_BTV = entropy_and_surplus(logp_BTV)
        surplus_BT = surplus_BTV.gather(-1, batch.response_BT[..., None]).squeeze(-1)
        log_ratio_N = (inputs.logp_BT.detach() - inputs.logp_old_BT)[valid_BT]
        ratio_N = log_ratio_N.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        clip_metrics(
            meter,
            ratio_N,
            inputs.advantages_BT[valid_BT],
            surplus_BT[valid_BT],
            inputs.logp_old_BT[valid_BT],
            self.config.eps_low,
            self.config.eps_high,
        )
        if self._observe:
            self._observe(logp_BTV[valid_BT], batch.response_BT[valid_BT], ratio_N, inputs.advantages_BT[valid_BT])
        meter.add("ppo_kl", -log_ratio_N.sum(), ratio_N.numel())
        meter.add("weight_mean", result.token.weight_BT[valid_BT].sum(), ratio_N.numel())
        return ratio_N


def _optimizer(config: RLConfig, model) -> tuple[torch.optim.AdamW, list[float]]:
    o = config.optimizer
    named = dict(model.named_parameters())
    head = [p for name, p in named.items() if name.startswith("output_layer")]
    if o.head_lr is None:
        groups = [{"params": list(named.values()), "lr": o.body_lr}]
    else:
        if not head:
            raise ValueError("head_lr needs a policy with its own output head: set untie_head=True")
        body = [p for name, p in named.items() if not name.startswith("output_layer")]
        groups = [{"params": body, "lr": o.body_lr}, {"params": head, "lr": o.head_lr}]
    adamw = torch.optim.AdamW(groups, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay, fused=True)
    return adamw, [group["lr"] for group in groups]
