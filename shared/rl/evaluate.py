"""A policy on held-out problems of a generated task: pass@1, pass@n, entropy, lengths (docs/metrics.md).

evaluate_policy(model, task, task.problems("eval", 128, seed=0), n=8, seed=0)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from shared.data.tasks.base import Task
from shared.engines.contracts import Rollouts, Sampling
from shared.engines.native import NativeEngine
from shared.megatron.model import forward_logits
from shared.metrics.passk import pass_at_k

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

_FORWARD_ROWS = 128


def evaluate_policy(
    model: GPTModel, task: Task, problems: Sequence[Any], n: int, seed: int, temperature: float = 1.0
) -> dict[str, float]:
    """Sample n responses per problem and verify them.

    Returns pass@1 and pass@n (unbiased, mean over problems), `entropy` (nats: mean over all response tokens of the
    entropy of the sampling distribution over the whole vocabulary), `length_mean` (tokens, eos included) and
    `truncated` (share of responses that hit `task.max_response_len`).
    """
    prompts = [task.prompt(problem) for problem in problems]
    sampling = Sampling(max_new_tokens=task.max_response_len, temperature=temperature)
    rollouts = NativeEngine(model, task.eos_id, task.pad_id).generate(prompts, sampling, n, seed)
    responses = [
        row[:length] for row, length in zip(rollouts.tokens_NT.tolist(), rollouts.lengths_N.tolist(), strict=True)
    ]
    correct_N = [task.verify(problems[i // n], response).correct for i, response in enumerate(responses)]
    counts_P = np.array(correct_N).reshape(len(problems), n).sum(1).tolist()
    sequences = [prompts[i // n] + response for i, response in enumerate(responses)]
    return {
        **{f"pass@{k}": float(np.mean([pass_at_k(n, c, k) for c in counts_P])) for k in sorted({1, n})},
        "entropy": float(
            response_entropy(model, sequences, rollouts.prompt_lengths_N, task.pad_id, temperature).mean()
        ),
        "length_mean": float(rollouts.lengths_N.float().mean()),
        "truncated": _share_truncated(rollouts),
    }


@torch.inference_mode()
def response_entropy(
    model: GPTModel, sequences: Sequence[Sequence[int]], prompt_lengths_N: Tensor, pad_id: int, temperature: float = 1.0
) -> Tensor:
    """(M,) entropy in nats at each of the M response tokens, sequence by sequence."""
    parts = []
    for start in range(0, len(sequences), _FORWARD_ROWS):
        rows = sequences[start : start + _FORWARD_ROWS]
        tokens_BL, response_BL = pad_sequences(rows, prompt_lengths_N[start : start + len(rows)].tolist(), pad_id)
        device = next(model.parameters()).device
        logits_BTV = forward_logits(model, tokens_BL[:, :-1].to(device))
        logp_MV = (logits_BTV[response_BL[:, 1:].to(device)] / temperature).log_softmax(-1)
        parts.append(-(logp_MV.exp() * logp_MV).sum(-1))
    return torch.cat(parts)


def pad_sequences(
    sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int], pad_id: int
) -> tuple[Tensor, Tensor]:
    """Right-padded tokens_BL (int64) and response_BL (bool: the token belongs to the response)."""
    width = max(map(len, sequences))
    tokens_BL = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in sequences])
    lengths_B1 = torch.tensor([[len(row)] for row in sequences])
    position_L = torch.arange(width)
    return tokens_BL, (position_L >= torch.tensor(prompt_lengths)[:, None]) & (position_L < lengths_B1)


def _share_truncated(rollouts: Rollouts) -> float:
    return sum(reason == "length" for reason in rollouts.finish_reason_N) / len(rollouts.finish_reason_N)
