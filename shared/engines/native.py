"""KV-cached generation that reads the trainer's own parameters: nothing to copy, nothing to go stale.

A lean decode function for the dense Llama / Qwen3 shape of `shared.megatron.model`, equal to its forward pass:

    engine = NativeEngine(model, eos_id=2, pad_id=0)
    rollouts = engine.generate(prompts, Sampling(max_new_tokens=24), n=8, seed=0)

Each distinct prompt is read once, whatever n. Token k of sample j of a prompt is the inverse CDF at a uniform that is a
function of (seed, prompt, j, k): a response does not depend on what else is in the batch, rounding in the last bits of
the logits aside. Samples of a prompt that occurs twice in a call are numbered on, so they differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from shared.engines.contracts import BadRequest, BadWeights, FinishReason, Rollouts, Sampling, SelfCheckFailed
from shared.engines.decode import Decoder
from shared.megatron.model import forward_logits

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

# Finished rows are decoded along until they are this share of the batch: dropping them copies the cache.
COMPACT_SHARE = 0.25
# Nats. Rounding in float32 made 1e-6 on fresh models and 1e-5 on sharp ones of four layers.
SELF_CHECK_TOLERANCE = 1e-3


class NativeEngine:
    """Generates from `model` as it is at each call. `eos_id` ends a response, `pad_id` fills it up."""

    def __init__(self, model: GPTModel, eos_id: int, pad_id: int):
        """Raises `UnsupportedModel` where the layers are not those of `shared.megatron.spec.decoder_spec`."""
        self.model = model
        self.eos_id = eos_id
        self.pad_id = pad_id
        self._decoder = Decoder(model)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int, seed: int) -> Rollouts:
        """See `shared.engines.contracts.Rollouts`; tensors are on the model's device. Raises `BadRequest`."""
        keys = [tuple(int(token) for token in prompt) for prompt in prompts]
        self._check(keys, sampling, n)
        device = self._decoder.device
        unique = {key: row for row, key in enumerate(dict.fromkeys(keys))}
        source_N = torch.tensor([unique[key] for key in keys for _ in range(n)], device=device)
        uniform_NT = torch.from_numpy(_uniforms(keys, n, sampling.max_new_tokens, seed)).to(device)

        with torch.inference_mode():
            tokens_NT, logprobs_NT, lengths_N = self._sample(list(unique), source_N, sampling, uniform_NT)
        # Outside: a tensor made in inference mode cannot take part in the trainer's loss.
        return self._rollouts(tokens_NT, logprobs_NT, lengths_N, [len(key) for key in keys for _ in range(n)])

    def _sample(
        self, prompts: list[tuple[int, ...]], source_N: torch.Tensor, sampling: Sampling, uniform_NT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens and log-probabilities [N, max_new_tokens], arbitrary after the end token, and lengths [N]."""
        logits_BV, cache = self._decoder.prefill(prompts, sampling.max_new_tokens)
        logits_BV, cache = logits_BV[source_N], cache.select(source_N)
        tokens_NT = torch.full(uniform_NT.shape, self.pad_id, device=source_N.device)
        logprobs_NT = torch.zeros(uniform_NT.shape, device=source_N.device)
        lengths_N = torch.full_like(source_N, sampling.max_new_tokens)
        rows_B = torch.arange(len(source_N), device=source_N.device)
        alive_B = torch.ones_like(rows_B, dtype=torch.bool)
        for step in range(sampling.max_new_tokens):
            token_B, logprob_B = _pick(logits_BV, sampling, uniform_NT[rows_B, step])
            tokens_NT[rows_B, step] = token_B
            logprobs_NT[rows_B, step] = logprob_B
            stopped_B = alive_B & (token_B == self.eos_id)
            lengths_N[rows_B[stopped_B]] = step + 1
            alive_B &= ~stopped_B
            alive = int(alive_B.sum())
            if not alive or step + 1 == sampling.max_new_tokens:
                break
            if alive <= (1 - COMPACT_SHARE) * len(rows_B):
                keep = alive_B.nonzero().squeeze(1)
                rows_B, token_B, alive_B, cache = rows_B[keep], token_B[keep], alive_B[keep], cache.select(keep)
            logits_BV = self._decoder.decode(token_B, cache)
        return tokens_NT, logprobs_NT, lengths_N

    def _rollouts(
        self, tokens_NT: torch.Tensor, logprobs_NT: torch.Tensor, lengths_N: torch.Tensor, prompt_lengths: list[int]
    ) -> Rollouts:
        longest = int(lengths_N.max())
        tokens_NT, logprobs_NT = tokens_NT[:, :longest], logprobs_NT[:, :longest]
        padding_NT = torch.arange(longest, device=lengths_N.device) >= lengths_N[:, None]
        last_N = tokens_NT.gather(1, lengths_N[:, None] - 1).squeeze(1)
        reasons: tuple[FinishReason, ...] = tuple(
            "stop" if stopped else "length" for stopped in (last_N == self.eos_id).tolist()
        )
        return Rollouts(
            tokens_NT=tokens_NT.masked_fill(padding_NT, self.pad_id),
            logprobs_NT=logprobs_NT.masked_fill(padding_NT, 0.0),
            lengths_N=lengths_N.clone(),
            prompt_lengths_N=torch.tensor(prompt_lengths, device=lengths_N.device),
            finish_reason_N=reasons,
        )

    def _check(self, keys: list[tuple[int, ...]], sampling: Sampling, n: int) -> None:
        if not keys or n < 1:
            raise BadRequest(f"{len(keys)} prompts, n={n}: give at least one of each")
        limit = self.model.max_sequence_length
        for row, key in enumerate(keys):
            if not key or not 0 <= min(key) <= max(key) < self.model.vocab_size:
                raise BadRequest(f"prompt {row} is empty or has a token outside 0..{self.model.vocab_size - 1}: {key}")
            if len(key) + sampling.max_new_tokens > limit:
                raise BadRequest(
                    f"prompt {row} has {len(key)} tokens; with max_new_tokens={sampling.max_new_tokens} it passes the "
                    f"model's max_sequence_length={limit}: shorten one, or build the model longer"
                )

    @torch.no_grad()
    def load_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy a complete set of tensors, named as in `model.named_parameters()`, into the model; then self-check.

        The trainer's own model needs none of this: `generate` sees its updates. Raises `BadWeights` before anything
        is copied, `SelfCheckFailed` after.
        """
        new = dict(named_tensors)
        old = dict(self.model.named_parameters())
        if new.keys() != old.keys():
            raise BadWeights(f"missing {sorted(old.keys() - new.keys())}, unknown {sorted(new.keys() - old.keys())}")
        for name, tensor in new.items():
            if tensor.shape != old[name].shape:
                raise BadWeights(f"{name} has shape {tuple(tensor.shape)}, the model has {tuple(old[name].shape)}")
            if not tensor.isfinite().all():
                raise BadWeights(f"{name} holds NaN or Inf: send the last good checkpoint instead")
        for name, tensor in new.items():
            old[name].copy_(tensor)
        self.self_check()

    @torch.no_grad()
    def self_check(self) -> None:
        """Compare a few sampled log-probabilities with the model's forward pass. Raises `SelfCheckFailed`."""
        new = min(8, self.model.max_sequence_length - 3)
        prompts = [[0], [self.model.vocab_size - 1, 0, 1 % self.model.vocab_size]]
        rollouts = self.generate(prompts, Sampling(max_new_tokens=new), n=2, seed=0)
        for row, length in enumerate(rollouts.lengths_N.tolist()):
            prompt = prompts[row // 2]
            response_T = rollouts.tokens_NT[row, :length].clone()
            tokens_BT = torch.cat((torch.tensor(prompt, device=response_T.device), response_T))[None]
            logits_TV = forward_logits(self.model, tokens_BT)[0, len(prompt) - 1 : -1]
            expected_T = logits_TV.log_softmax(-1).gather(1, response_T[:, None]).squeeze(1)
            gap = (expected_T - rollouts.logprobs_NT[row, :length]).abs().max().item()
            if not gap <= SELF_CHECK_TOLERANCE:
                raise SelfCheckFailed(
                    f"cached decoding and the forward pass differ by {gap:.2e} nats (limit {SELF_CHECK_TOLERANCE}): "
                    "do not train on these rollouts; check that no forward hook or adapter changes the model"
                )


def _pick(logits_BV: torch.Tensor, sampling: Sampling, uniform_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    probs_BV = torch.softmax(logits_BV / sampling.temperature, -1)
    if sampling.greedy:
        token_B1 = logits_BV.argmax(-1, keepdim=True)
    else:
        # In float64 a uniform below 1 stays below the total after rounding: the search never runs off the end.
        cdf_BV = probs_BV.cumsum(-1, dtype=torch.float64)
        token_B1 = torch.searchsorted(cdf_BV, (uniform_B * cdf_BV[:, -1]).unsqueeze(1), right=True)
    return token_B1.squeeze(1), probs_BV.gather(1, token_B1).squeeze(1).log()


def _uniforms(prompts: list[tuple[int, ...]], n: int, length: int, seed: int) -> np.ndarray:
    """Float64 [len(prompts) * n, length] in [0, 1 - 2^-52], a function of (seed, prompt, sample, position).

    The counter-based form of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014, fig. 13), its state a hash of the prompt.
    """
    seen: dict[tuple[int, ...], int] = {}
    state, sample = [], []
    for prompt in prompts:
        first = seen.get(prompt, 0)
        seen[prompt] = first + n
        digest = hashlib.blake2b(np.asarray(prompt, "<i8").tobytes(), key=str(seed).encode(), digest_size=8).digest()
        state += [int.from_bytes(digest, "little")] * n
        sample += range(first, first + n)
    counter_NT = (np.array(sample, np.uint64)[:, None] << np.uint64(32)) + np.arange(1, length + 1, dtype=np.uint64)
    z = np.array(state, np.uint64)[:, None] + counter_NT * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(12)) * 2.0**-52
