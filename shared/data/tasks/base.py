"""The contract of generated tasks with exact verifiers: problems, prompts, derivations, verdicts. No torch.

A task is a frozen dataclass whose fields set its difficulty, so it prints whole into a record:

    task = get_task("styled_countdown", numbers=(3,))
    for problem in task.problems("eval", n=128, seed=0):
        prompt = task.prompt(problem)            # list of token ids
        verdict = task.verify(problem, response) # response: token ids up to and including eos

Held-out problems stay held out: the split is a hash of the problem itself (16 classes: 2 eval, 6 rl, 8 sft), so no
seed and no pool size can move a problem from one split to another.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, get_args

import numpy as np

from shared.experiment.contracts import AssayError

if TYPE_CHECKING:
    from numpy.random import Generator

Split = Literal["sft", "rl", "eval"]

OK = "ok"
"""The response is a complete, correct derivation of the target."""
NO_EOS = "no_eos"
"""The response does not end with the end token: it was cut off."""
FORMAT = "format"
"""The response cannot be read as steps (a token where none belongs, a leading zero, a token after the end)."""
STEPS = "steps"
"""Readable, but more or fewer steps than the problem needs."""
OPERAND = "operand"
"""A step uses a number that is not available, or uses one twice."""
OPERATOR = "operator"
"""A step applies another operator than the problem asks for."""
ARITHMETIC = "arithmetic"
"""A step's result is wrong."""
RANGE = "range"
"""A step's result is right but outside the allowed range."""
TARGET = "target"
"""Every step is right, but the last result is not the target."""


@dataclass(frozen=True)
class Verdict:
    """Outcome of `Task.verify`: `correct`, and one of the reason codes above (`ok` exactly when correct)."""

    correct: bool
    reason: str


@dataclass(frozen=True)
class Problem:
    """A generated problem: the numbers as they stand in the prompt, and the final result."""

    numbers: tuple[int, ...]
    target: int


class TooFewProblems(AssayError):
    """The split holds fewer distinct problems than were asked for."""


class Task(Protocol):
    """A generated task. Implementations are frozen dataclasses; their fields are the difficulty.

    `max_response_len` is the generation budget in tokens, eos included; no derivation is longer.
    `reasons` lists every code that `verify` can return.
    """

    @property
    def name(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def bos_id(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def max_prompt_len(self) -> int: ...
    @property
    def max_response_len(self) -> int: ...
    @property
    def reasons(self) -> tuple[str, ...]: ...

    def problems(self, split: Split, n: int, seed: int) -> list[Any]:
        """`n` problems of a split; a smaller `n` gives a prefix. No duplicates in "eval", iid draws elsewhere.

        Raises `TooFewProblems` if the split holds fewer than `n` distinct ones (eval) or none at all.
        """
        ...

    def prompt(self, problem: Any) -> list[int]:
        """Token ids of the prompt, bos first."""
        ...

    def derivation(self, problem: Any, rng: Generator) -> list[int]:
        """A random correct response, eos last."""
        ...

    def verify(self, problem: Any, response_ids: Sequence[int]) -> Verdict:
        """Check a response (ids up to and including eos, no padding). Never raises, whatever the ids."""
        ...

    def render(self, ids: Sequence[int]) -> str:
        """Readable text of token ids, special tokens included."""
        ...


def split_of_residue(residue: int) -> Split:
    """Split of a hash class in 0..15: 0, 1 eval; 2..7 rl; 8..15 sft (facts/rl-regime.md, recipe H)."""
    return "eval" if residue < 2 else "rl" if residue < 8 else "sft"


def split_of_text(text: str) -> Split:
    """Split of a problem by a hash of its canonical text; the same on every machine and in every process."""
    return split_of_residue(blake2b(text.encode(), digest_size=1).digest()[0] % 16)


P = TypeVar("P", bound=Problem)

# A fixed batch makes a short list of problems a prefix of a longer one with the same seed.
_BATCH = 1024
_IDLE_BATCHES = 64


def draw_problems(
    sample: Callable[[Generator, int], list[P]],
    split_of: Callable[[P], Split],
    key: Callable[[P], Hashable],
    split: Split,
    n: int,
    seed: int,
) -> list[P]:
    """Rejection sampling behind `Task.problems`. `key` says when two problems are the same one."""
    rng = np.random.default_rng([get_args(Split).index(split), seed])
    found: list[P] = []
    seen: set[Hashable] = set()
    idle = 0
    while len(found) < n:
        before = len(found)
        for problem in sample(rng, _BATCH):
            if split_of(problem) != split:
                continue
            if split == "eval":
                if key(problem) in seen:
                    continue
                seen.add(key(problem))
            found.append(problem)
        idle = 0 if len(found) > before else idle + 1
        if idle == _IDLE_BATCHES:
            raise TooFewProblems(
                f"Split {split!r} holds only about {len(found)} problems at this difficulty, not {n}: "
                "ask for fewer or raise the difficulty."
            )
    return found[:n]
