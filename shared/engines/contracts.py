"""What every generation engine takes and returns. Torch is imported by engines, not here.

Rows are sample-major inside a prompt: rows i*n .. i*n + n - 1 of a `Rollouts` belong to prompt i.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from shared.experiment.contracts import AssayError

if TYPE_CHECKING:
    import torch

FinishReason = Literal["stop", "length"]


class BadRequest(AssayError):
    """A prompt or a sampling setting that no engine can serve."""


class UnsupportedModel(AssayError):
    """The engine cannot decode this architecture."""


class BadWeights(AssayError):
    """Named tensors that do not fit the engine's model. The model keeps its weights."""


class SelfCheckFailed(AssayError):
    """After new weights, the engine's log-probabilities differ from the model's own forward pass."""


@dataclass(frozen=True)
class Sampling:
    """`temperature` divides the logits; `greedy` takes the most likely token. No truncation of the vocabulary."""

    max_new_tokens: int
    temperature: float = 1.0
    greedy: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise BadRequest(f"max_new_tokens={self.max_new_tokens}: ask for at least one token")
        if not 0 < self.temperature < float("inf"):
            raise BadRequest(f"temperature={self.temperature}: give a positive number, or greedy=True for the argmax")


@dataclass(frozen=True)
class Rollouts:
    """N = len(prompts) * n responses; T is the longest one.

    tokens_NT: int64, the response with its end token if it got there, padded on the right with the pad id.
    logprobs_NT: float32 nats, log-probability of each token under the distribution it was drawn from (temperature
        applied, whole vocabulary; under `greedy` that of softmax(logits / temperature)); 0 on padding.
    lengths_N: int64, response tokens including the end token. prompt_lengths_N: int64, tokens of the row's prompt.
    finish_reason_N: "stop" if the last token is the end token, else "length".
    """

    tokens_NT: torch.Tensor
    logprobs_NT: torch.Tensor
    lengths_N: torch.Tensor
    prompt_lengths_N: torch.Tensor
    finish_reason_N: tuple[FinishReason, ...]

    def select(self, rows_M: torch.Tensor) -> Rollouts:
        """The given rows, in the order given."""
        return Rollouts(
            tokens_NT=self.tokens_NT[rows_M],
            logprobs_NT=self.logprobs_NT[rows_M],
            lengths_N=self.lengths_N[rows_M],
            prompt_lengths_N=self.prompt_lengths_N[rows_M],
            finish_reason_N=tuple(self.finish_reason_N[i] for i in rows_M.tolist()),
        )

    def cpu(self) -> Rollouts:
        """The same responses in the CPU's memory."""
        return Rollouts(
            self.tokens_NT.cpu(),
            self.logprobs_NT.cpu(),
            self.lengths_N.cpu(),
            self.prompt_lengths_N.cpu(),
            self.finish_reason_N,
        )


class Engine(Protocol):
    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int, seed: int) -> Rollouts:
        """Draw n responses per prompt; prompts may differ in length. Raises `BadRequest`."""
        ...

    def load_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take over new weights, then check the engine against the model. Raises `BadWeights`, `SelfCheckFailed`."""
        ...
