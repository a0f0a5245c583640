"""Scratchpad multiplication: one partial product per digit, then the running sum: `^47*36:` ->
`47*6=282;47*3=141;282+1410=1692$`.

Digits of the second factor are taken from the right; each partial product is shifted by its place and added to the sum
so far, so the last result is the product. One derivation is right. Difficulty is the number of digits:

    task = ScratchpadMultiplication(digits=3)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shared.data.tasks import base, characters
from shared.data.tasks.base import Problem, Split, Verdict
from shared.data.tasks.characters import Step

if TYPE_CHECKING:
    from numpy.random import Generator

MAX_DIGITS = 8
"""Products stay within the 18 digits that the reader of steps accepts."""


@dataclass(frozen=True)
class ScratchpadMultiplication:
    """Products of two numbers with exactly `digits` digits each (no leading zero); `Problem.numbers` is the pair."""

    name: str = field(default="multiplication", init=False)
    digits: int = 2

    vocab_size = len(characters.SYMBOLS)
    pad_id = characters.PAD
    bos_id = characters.BOS
    eos_id = characters.EOS
    reasons = (base.OK, base.NO_EOS, base.FORMAT, base.STEPS, base.OPERAND, base.OPERATOR, base.ARITHMETIC)

    def __post_init__(self) -> None:
        if not 1 <= self.digits <= MAX_DIGITS:
            raise ValueError(f"digits must lie in 1..{MAX_DIGITS}")

    @property
    def max_prompt_len(self) -> int:
        return 2 * self.digits + 3

    @property
    def max_response_len(self) -> int:
        largest = 10**self.digits - 1
        return len(self.derivation(Problem((largest, largest), largest**2), None))

    def problems(self, split: Split, n: int, seed: int) -> list[Problem]:
        """See `Task.problems`."""
        return base.draw_problems(
            self._sample, lambda p: base.split_of_text("*".join(map(str, p.numbers))), lambda p: p, split, n, seed
        )

    def prompt(self, problem: Problem) -> list[int]:
        """`^47*36:`"""
        return characters.encode(f"^{problem.numbers[0]}*{problem.numbers[1]}:")

    def derivation(self, problem: Problem, rng: Generator | None) -> list[int]:
        """The one right response; `rng` is not used."""
        return characters.encode(";".join(f"{a}{op}{b}={c}" for a, op, b, c in _steps(problem)) + "$")

    def verify(self, problem: Problem, response_ids: Sequence[int]) -> Verdict:
        """Compare step by step with the one right derivation."""
        return characters.verify_fixed(_steps(problem), response_ids)

    def render(self, ids: Sequence[int]) -> str:
        """The characters themselves."""
        return characters.decode(ids)

    def _sample(self, rng: Generator, n: int) -> list[Problem]:
        pairs = rng.integers(10 ** (self.digits - 1), 10**self.digits, size=(n, 2)).tolist()
        return [Problem((a, b), a * b) for a, b in pairs]


def _steps(problem: Problem) -> list[Step]:
    a, b = problem.numbers
    steps: list[Step] = []
    total = 0
    for place, digit in enumerate(reversed(str(b))):
        partial = a * int(digit)
        steps.append((a, "*", int(digit), partial))
        if place:
            shifted = partial * 10**place
            steps.append((total, "+", shifted, total + shifted))
            total += shifted
        else:
            total = partial
    return steps
