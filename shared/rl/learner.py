"""The policy being trained: model, optimiser, and the updates of one rollout under any rule.

learner = Learner(config, model)
metrics = learner.update(batch, seed=0, rollout=3)      # epochs x minibatches optimiser steps

Under data parallelism every rank calls it with the same batch and trains on its rows (`shared.rl.ranks`).
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
from shared.rl.pipeline import PolicyLossResult, policy_loss
from shared.rl.ranks import Rows
from shared.rl.rollout import RolloutBatch
from shared.rl.update import LocalUpdate, Update

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
    """Holds the model and its optimiser; knows nothing of where batches come from.

    `update` takes the optimiser's steps; None is AdamW on the whole model in this process.
    """

    def __init__(self, config: RLConfig, model, update: Update | None = None) -> None:
        self.config, self.model = config, model
        self.optimizer = update or LocalUpdate(config.optimizer, model)
        self.rows = Rows()
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
        batch = batch.to(self.device)
        width = batch.mask_BT.shape[1]
        parts = [(torch.zeros(0, width, device=self.device),) * 2]
        mine = range(len(batch))[self.rows.mine(len(batch))]
        for first in range(mine.start, mine.stop, _FORWARD_ROWS):
            rows = torch.arange(first, min(first + _FORWARD_ROWS, mine.stop))
            part = batch.rows(rows)
            logp_BTV = response_logits(self.model, part, self.config.temperature).log_softmax(-1)
            logp_BT = logp_BTV.gather(-1, part.response_BT[..., None]).squeeze(-1)
            entropy_BT = -(logp_BTV.exp() * logp_BTV).sum(-1)
            parts.append((logp_BT * part.mask_BT, entropy_BT * part.mask_BT))
        logp_BT, entropy_BT = (self.rows.gather(torch.cat(part), len(batch)) for part in zip(*parts, strict=True))
        return logp_BT, entropy_BT

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
        mine = self.rows.mine(len(batch))
        loss, token_BT3 = None, torch.zeros(0, batch.mask_BT.shape[1], 3, device=self.device)
        if mine.start < mine.stop:
            part = batch.rows(mine)
            logp_BTV = response_logits(self.model, part, self.config.temperature).log_softmax(-1)
            inputs = self._inputs(part, logp_BTV, logp_old_BT[mine], entropy_old_BT[mine])
            result = self._loss(batch, part, inputs)
            loss = result.loss
            if self._observe:
                self._tell_observer(part, inputs, logp_BTV.detach())
            token_BT3 = _per_token(part, inputs, logp_BTV.detach(), result)
        total, norm = self.optimizer.step(loss, self._scale())
        if not (np.isfinite(total) and np.isfinite(norm)):
            raise NonFinite(f"loss {total} and gradient norm {norm} at {where}")
        self.updates += 1
        return self._measure(batch, logp_old_BT, self.rows.gather(token_BT3, len(batch)), meter), norm

    def _inputs(self, batch, logp_BTV: Tensor, logp_old_BT: Tensor, entropy_old_BT: Tensor) -> LossInputs:
        logp_BT = logp_BTV.gather(-1, batch.response_BT[..., None]).squeeze(-1)
        entropy_BT = -(logp_BTV.exp() * logp_BTV).sum(-1) if self.config.terms.entropy_coef else None
        return LossInputs(
            logp_BT,
            logp_old_BT,
            batch.advantages_B[:, None].expand_as(logp_BT),
            batch.mask_BT,
            entropy_BT,
            entropy_old_BT,
            logp_rollout_BT=batch.logp_rollout_BT,
        )

    def _loss(self, whole, part, inputs: LossInputs) -> PolicyLossResult:
        """This rank's share of the mini-batch's loss: all divisors are those of the whole mini-batch."""
        c = self.config
        denominators = Denominators.of(whole.mask_BT, norm=float(len(whole) * c.task.max_response_len))
        positive_tokens = float((whole.mask_BT * (whole.reward_B == 1.0)[:, None]).sum())
        return policy_loss(
            inputs, c.loss, c.terms, denominators, positive_B=part.reward_B == 1.0, positive_tokens=positive_tokens
        )

    def _scale(self) -> float:
        per_rollout = self.config.epochs * self.config.minibatches
        warmup = max(1, self.config.optimizer.warmup_rollouts * per_rollout)
        return min(1.0, (self.updates + 1) / warmup)

    def _tell_observer(self, batch, inputs: LossInputs, logp_BTV: Tensor) -> None:
        assert self._observe is not None
        valid_BT = batch.mask_BT.bool()
        ratio_N = _ratio(inputs.logp_BT.detach(), inputs.logp_old_BT)[valid_BT]
        self._observe(logp_BTV[valid_BT], batch.response_BT[valid_BT], ratio_N, inputs.advantages_BT[valid_BT])

    def _measure(self, batch, logp_old_BT: Tensor, token_BT3: Tensor, meter: Meter) -> Tensor:
        valid_BT = batch.mask_BT.bool()
        logp_N, surplus_N, weight_N = token_BT3[valid_BT].T.contiguous()
        log_ratio_N = logp_N - logp_old_BT[valid_BT]
        ratio_N = log_ratio_N.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        clip_metrics(
            meter,
            ratio_N,
            batch.advantages_B[:, None].expand_as(valid_BT)[valid_BT],
            surplus_N,
            logp_old_BT[valid_BT],
            self.config.eps_low,
            self.config.eps_high,
        )
        meter.add("ppo_kl", -log_ratio_N.sum(), ratio_N.numel())
        meter.add("weight_mean", weight_N.sum(), ratio_N.numel())
        return ratio_N


def _ratio(logp_BT: Tensor, logp_old_BT: Tensor) -> Tensor:
    return (logp_BT - logp_old_BT).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


@torch.no_grad()
def _per_token(batch, inputs: LossInputs, logp_BTV: Tensor, result: PolicyLossResult) -> Tensor:
    """(B, T, 3): log-probability, surplus and gradient weight F of every response token."""
    _, surplus_BTV = entropy_and_surplus(logp_BTV)
    surplus_BT = surplus_BTV.gather(-1, batch.response_BT[..., None]).squeeze(-1)
    return torch.stack((inputs.logp_BT.detach(), surplus_BT, result.token.weight_BT.expand_as(surplus_BT)), -1)
