"""Chained modular arithmetic, one step per operator: `^3+5*2,7:` -> `3+5=1;1*2=2$`.

The chain is evaluated strictly from left to right, every result reduced to 0..modulus-1; the modulus stands after the
comma. One derivation is right. Difficulty is the length of the chain:

    task = ChainedModular(length=6, modulus=7)
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


@dataclass(frozen=True)
class ModularProblem(Problem):
    """`numbers` joined by `operators` (one fewer), evaluated left to right; `target` is the last result."""

    operators: str


@dataclass(frozen=True)
class ChainedModular:
    """Chains of `length` operators drawn from + - *, numbers 0..modulus-1."""

    name: str = field(default="modular", init=False)
    length: int = 3
    modulus: int = 7

    vocab_size = len(characters.SYMBOLS)
    pad_id = characters.PAD
    bos_id = characters.BOS
    eos_id = characters.EOS
    reasons = (base.OK, base.NO_EOS, base.FORMAT, base.STEPS, base.OPERAND, base.OPERATOR, base.ARITHMETIC)

    @property
    def max_prompt_len(self) -> int:
        return 1 + (self.length + 1) * (self._digits + 1) + len(str(self.modulus)) + 1

    @property
    def max_response_len(self) -> int:
        return self.length * (3 * self._digits + 3)

    @property
    def _digits(self) -> int:
        return len(str(self.modulus - 1))

    def problems(self, split: Split, n: int, seed: int) -> list[ModularProblem]:
        """See `Task.problems`."""
        return base.draw_problems(
            self._sample, lambda p: base.split_of_text(self._text(p)), lambda p: p, split, n, seed
        )

    def prompt(self, problem: ModularProblem) -> list[int]:
        """`^3+5*2,7:`"""
        return characters.encode(f"^{self._text(problem)}:")

    def derivation(self, problem: ModularProblem, rng: Generator) -> list[int]:
        """The one right response; `rng` is not used."""
        written = (f"{a}{op}{b}={c}" for a, op, b, c in self._steps(problem.numbers, problem.operators))
        return characters.encode(";".join(written) + "$")

    def verify(self, problem: ModularProblem, response_ids: Sequence[int]) -> Verdict:
        """Compare step by step with the one right derivation."""
        return characters.verify_fixed(self._steps(problem.numbers, problem.operators), response_ids)

    def render(self, ids: Sequence[int]) -> str:
        """The characters themselves."""
        return characters.decode(ids)

    def _text(self, problem: ModularProblem) -> str:
        pairs = zip(problem.operators, problem.numbers[1:], strict=True)
        return f"{problem.numbers[0]}{''.join(f'{op}{number}' for op, number in pairs)},{self.modulus}"

    def _sample(self, rng: Generator, n: int) -> list[ModularProblem]:
        numbers_NK = rng.integers(0, self.modulus, size=(n, self.length + 1)).tolist()
        operators_NK = rng.integers(0, 3, size=(n, self.length)).tolist()
        problems = []
        for row, choice in zip(numbers_NK, operators_NK, strict=True):
            numbers, operators = tuple(row), "".join("+-*"[i] for i in choice)
            problems.append(ModularProblem(numbers, self._steps(numbers, operators)[-1][3], operators))
        return problems

    def _steps(self, numbers: tuple[int, ...], operators: str) -> list[Step]:
        steps: list[Step] = []
        result = numbers[0]
        for op, number in zip(operators, numbers[1:], strict=True):
            a = result
            result = (a + number if op == "+" else a - number if op == "-" else a * number) % self.modulus
            steps.append((a, op, number, result))
        return steps
