"""Countdown: reach a target from given numbers with + - *, every number used once, all results in 0..99.

`PlainCountdown` writes it in characters: `^9,6,9=63:` -> `6*9=54;54+9=63$`.
`StyledCountdown` (facts/rl-regime.md, recipe H) gives every number one token and surrounds the steps with free
"style words": peaked, multi-modal tokens that never decide the reward. The verifier deletes them first.

    task = PlainCountdown(numbers=(3, 4))      # a mix of three and four numbers
    task = StyledCountdown(zipf_exponent=1.0)  # flatter style words

A target is the end of a random valid sequence of steps, so every problem is solvable, and `derivation` draws uniformly
among the sequences that reach the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import numpy as np

from shared.data.tasks import base, characters
from shared.data.tasks.base import Problem, Split, Verdict
from shared.data.tasks.characters import Step

if TYPE_CHECKING:
    from numpy.random import Generator
    from numpy.typing import NDArray

MAX_RESULT = 99
OPERATORS = "+-*"


@lru_cache(maxsize=4096)
def derivations(numbers: tuple[int, ...]) -> tuple[tuple[Step, ...], ...]:
    """All valid step sequences over the numbers (ascending), commuted operands counted once (smaller first).

    Equal numbers are told apart, so a sequence can occur more than once: the weight it has in random play.
    """
    found: list[tuple[Step, ...]] = []

    def extend(available: tuple[int, ...], steps: tuple[Step, ...]) -> None:
        if len(available) == 1:
            found.append(steps)
            return
        for i in range(len(available)):
            for j in range(i + 1, len(available)):
                rest = available[:i] + available[i + 1 : j] + available[j + 1 :]
                small, large = sorted((available[i], available[j]))
                for step in _steps_of_pair(small, large):
                    extend((*rest, step[3]), (*steps, step))

    extend(numbers, ())
    return tuple(found)


@cache
def _steps_of_pair(small: int, large: int) -> tuple[Step, ...]:
    steps = (
        (small, "+", large, small + large),
        (large, "-", small, large - small),
        (small, "*", large, small * large),
    )
    return tuple(step for step in steps if step[3] <= MAX_RESULT)


def sample_problems(rng: Generator, n: int, counts: tuple[int, ...], max_number: int) -> list[Problem]:
    """Up to `n` problems: numbers iid uniform on 1..max_number, target by a random valid step sequence."""
    numbers_NK = rng.integers(1, max_number + 1, size=(n, max(counts))).tolist()
    count_N = rng.integers(0, len(counts), size=n).tolist()
    choice_N = rng.random(n).tolist()
    problems = []
    for row, count, choice in zip(numbers_NK, count_N, choice_N, strict=True):
        numbers = tuple(row[: counts[count]])
        options = derivations(tuple(sorted(numbers)))
        if options:
            problems.append(Problem(numbers, options[int(choice * len(options))][-1][3]))
    return problems


def solutions(problem: Problem) -> list[tuple[Step, ...]]:
    """All valid step sequences that end at the target, with the multiplicity of `derivations`."""
    return [steps for steps in derivations(tuple(sorted(problem.numbers))) if steps[-1][3] == problem.target]


def check_steps(problem: Problem, steps: Sequence[Step]) -> str:
    """Reason code of a step sequence: count, then per step operands, arithmetic and range, then the target."""
    if len(steps) != len(problem.numbers) - 1:
        return base.STEPS
    available = list(problem.numbers)
    result = -1
    for a, op, b, result in steps:
        if a not in available:
            return base.OPERAND
        available.remove(a)
        if b not in available:
            return base.OPERAND
        available.remove(b)
        if result != (a + b if op == "+" else a - b if op == "-" else a * b):
            return base.ARITHMETIC
        if not 0 <= result <= MAX_RESULT:
            return base.RANGE
        available.append(result)
    return base.OK if result == problem.target else base.TARGET


def _key(problem: Problem) -> tuple[tuple[int, ...], int]:
    return tuple(sorted(problem.numbers)), problem.target


def _swap(step: Step, swap: bool) -> Step:
    a, op, b, c = step
    return (b, op, a, c) if swap and op != "-" else step


STYLES = ("ascending", "swapped", "spaced", "result_first")


@dataclass(frozen=True)
class PlainCountdown:
    """Countdown in characters (facts/rollouts-and-rl-proxy.md section 3).

    Difficulty: `numbers`, how many numbers a problem has (several values: a uniform mix), and `max_number`.
    `styles`: how derivations are written, one drawn per derivation; the verifier accepts all of them, step by step.
    "ascending" `6*9=54` (smaller operand of + and * first), "swapped" (operands of + and * in random order),
    "spaced" `9 * 6 = 54 ; ...`, "result_first" `54=9*6` (the last two swap operands too).
    """

    name: str = field(default="plain_countdown", init=False)
    numbers: tuple[int, ...] = (3,)
    max_number: int = 9
    styles: tuple[str, ...] = ("swapped",)

    vocab_size = len(characters.SYMBOLS)
    pad_id = characters.PAD
    bos_id = characters.BOS
    eos_id = characters.EOS
    reasons = (
        base.OK,
        base.NO_EOS,
        base.FORMAT,
        base.STEPS,
        base.OPERAND,
        base.ARITHMETIC,
        base.RANGE,
        base.TARGET,
    )

    def __post_init__(self) -> None:
        if unknown := set(self.styles) - set(STYLES):
            raise ValueError(f"unknown style {sorted(unknown)}: choose from {STYLES}")

    @property
    def max_prompt_len(self) -> int:
        return 1 + max(self.numbers) * (len(str(self.max_number)) + 1) + len(str(MAX_RESULT)) + 1

    @property
    def max_response_len(self) -> int:
        result = len(str(MAX_RESULT))
        step = 2 * max(result, len(str(self.max_number))) + result + 2
        spaced = "spaced" in self.styles
        n_steps = max(self.numbers) - 1
        return n_steps * (step + 4 * spaced) + (n_steps - 1) * (1 + 2 * spaced) + 1

    def problems(self, split: Split, n: int, seed: int) -> list[Problem]:
        """See `Task.problems`; problems with the same multiset of numbers and target are the same one."""
        return base.draw_problems(
            lambda rng, size: sample_problems(rng, size, self.numbers, self.max_number),
            lambda problem: base.split_of_text(f"{sorted(problem.numbers)}={problem.target}"),
            _key,
            split,
            n,
            seed,
        )

    def prompt(self, problem: Problem) -> list[int]:
        """`^9,6,9=63:`"""
        return characters.encode(f"^{','.join(map(str, problem.numbers))}={problem.target}:")

    def derivation(self, problem: Problem, rng: Generator) -> list[int]:
        """A uniformly drawn solution in a uniformly drawn style."""
        options = solutions(problem)
        u = rng.random(len(problem.numbers) + 1).tolist()
        style = self.styles[int(u[0] * len(self.styles))]
        steps = options[int(u[1] * len(options))]
        template = {"spaced": "{0} {1} {2} = {3}", "result_first": "{3}={0}{1}{2}"}.get(style, "{0}{1}{2}={3}")
        separator = " ; " if style == "spaced" else ";"
        written = (
            template.format(*_swap(step, style != "ascending" and v < 0.5))
            for step, v in zip(steps, u[2:], strict=True)
        )
        return characters.encode(separator.join(written) + "$")

    def verify(self, problem: Problem, response_ids: Sequence[int]) -> Verdict:
        """Steps `a op b = c` or `c = a op b` joined by `;`, spaces between symbols allowed; see `check_steps`."""
        text = characters.response_text(response_ids)
        if text is None:
            return Verdict(False, base.NO_EOS)
        steps = characters.parse_steps(text, (characters.SPACED, characters.RESULT_FIRST))
        reason = base.FORMAT if steps is None else check_steps(problem, steps)
        return Verdict(reason == base.OK, reason)

    def render(self, ids: Sequence[int]) -> str:
        """The characters themselves."""
        return characters.decode(ids)


# Token ids of recipe H.
PAD, BOS, EOS, FIRST_NUMBER, FIRST_OPERATOR, EQUALS, COLON, FIRST_WORD = 0, 1, 2, 3, 103, 106, 107, 108


@lru_cache(maxsize=64)
def zipf_probabilities(n: int, exponent: float) -> NDArray[np.float64]:
    """(n,) probabilities proportional to rank**-exponent, ranks 1..n."""
    weights_N = np.arange(1, n + 1, dtype=np.float64) ** -exponent
    return weights_N / weights_N.sum()


@lru_cache(maxsize=64)
def _zipf_cumulative(n: int, exponent: float) -> NDArray[np.float64]:
    cumulative_N = np.cumsum(zipf_probabilities(n, exponent))
    cumulative_N[-1] = 1.0  # rounding must not leave a gap below 1 that a uniform draw could fall into
    return cumulative_N


@dataclass(frozen=True)
class StyledCountdown:
    """Countdown with style words: recipe H of facts/rl-regime.md (the defaults; vocabulary 284, 21-token responses).

    Tokens: 0 pad, 1 bos, 2 eos, 3..102 numbers 0-99, 103-105 + - *, 106 =, 107 :, then 16 synonyms per operator
    (108..155), then `classes_per_step` classes of 16 style words for each step (156..283).
    Prompt `bos n1 n2 n3 = t :`. Step i of a response: one word of each class 4i, 4i+1, 4i+2, a synonym of the
    operator, `a op b = c`, one word of class 4i+3; after the last step eos. Words and synonyms are iid Zipf;
    operands of + and * are swapped with probability 1/2. A word carries 1.353 nats; a trained policy has about 1.46 at
    word positions, because a synonym also reveals the operator (the facts' 1.46; their 1.470 belongs to 32 tokens).
    Difficulty: `numbers` and `max_number`, as in `PlainCountdown`. `max_response_len` leaves 3 tokens of slack (24).
    """

    name: str = field(default="styled_countdown", init=False)
    numbers: tuple[int, ...] = (3,)
    max_number: int = 12
    classes_per_step: int = 4
    words_per_class: int = 16
    zipf_exponent: float = 2.0

    pad_id = PAD
    bos_id = BOS
    eos_id = EOS
    reasons = (base.OK, base.NO_EOS, base.FORMAT, base.STEPS, base.OPERAND, base.ARITHMETIC, base.TARGET)

    def __post_init__(self) -> None:
        if not 1 <= self.max_number <= MAX_RESULT:
            raise ValueError(f"max_number must lie in 1..{MAX_RESULT}: every number is one token")

    @property
    def vocab_size(self) -> int:
        return self._first_style_word + (max(self.numbers) - 1) * self.classes_per_step * self.words_per_class

    @property
    def max_prompt_len(self) -> int:
        return max(self.numbers) + 4

    @property
    def max_response_len(self) -> int:
        return (max(self.numbers) - 1) * (self.classes_per_step + 6) + 1 + 3

    @property
    def _first_style_word(self) -> int:
        return FIRST_WORD + len(OPERATORS) * self.words_per_class

    def problems(self, split: Split, n: int, seed: int) -> list[Problem]:
        """See `Task.problems`. Split class (7 * sum(31 n^2) + 13 t) mod 16, sum over the numbers."""
        return base.draw_problems(
            lambda rng, size: sample_problems(rng, size, self.numbers, self.max_number),
            lambda problem: base.split_of_residue(
                (7 * sum(31 * number**2 for number in problem.numbers) + 13 * problem.target) % 16
            ),
            _key,
            split,
            n,
            seed,
        )

    def prompt(self, problem: Problem) -> list[int]:
        """`bos n1 n2 n3 = t :`"""
        numbers = [FIRST_NUMBER + number for number in problem.numbers]
        return [BOS, *numbers, EQUALS, FIRST_NUMBER + problem.target, COLON]

    def derivation(self, problem: Problem, rng: Generator) -> list[int]:
        """A uniformly drawn solution with freshly drawn words."""
        options = solutions(problem)
        n_steps, n_classes = len(problem.numbers) - 1, self.classes_per_step
        u = rng.random(1 + n_steps * (2 + n_classes))
        steps = options[int(u[0] * len(options))]
        swaps = (u[1 : 1 + n_steps] < 0.5).tolist()
        cumulative_N = _zipf_cumulative(self.words_per_class, self.zipf_exponent)
        ranks = np.searchsorted(cumulative_N, u[1 + n_steps :], side="right").tolist()
        ids: list[int] = []
        for i, step in enumerate(steps):
            a, op, b, c = _swap(step, swaps[i])
            operator = OPERATORS.index(op)
            *words, synonym = ranks[i * (n_classes + 1) : (i + 1) * (n_classes + 1)]
            first = self._first_style_word + i * n_classes * self.words_per_class
            words = [first + k * self.words_per_class + rank for k, rank in enumerate(words)]
            ids += words[:-1]
            ids.append(FIRST_WORD + operator * self.words_per_class + synonym)
            ids += [FIRST_NUMBER + a, FIRST_OPERATOR + operator, FIRST_NUMBER + b, EQUALS, FIRST_NUMBER + c]
            ids += words[-1:]
        ids.append(EOS)
        return ids

    def verify(self, problem: Problem, response_ids: Sequence[int]) -> Verdict:
        """Delete every style word (ids >= 108), then check the Countdown steps exactly; see `check_steps`."""
        core = [token for token in response_ids if token < FIRST_WORD]
        if not core or core[-1] != EOS or response_ids[-1] != EOS:
            return Verdict(False, base.NO_EOS)
        steps = _read_steps(core[:-1])
        reason = base.FORMAT if steps is None else check_steps(problem, steps)
        return Verdict(reason == base.OK, reason)

    def render(self, ids: Sequence[int]) -> str:
        """Tokens separated by spaces; synonyms as `+7`, style words as `class.rank`."""
        return " ".join(self._symbol(token) for token in ids)

    def _symbol(self, token: int) -> str:
        if token < 0 or token >= self.vocab_size:
            return "?"
        if token < FIRST_NUMBER:
            return ("<pad>", "<bos>", "<eos>")[token]
        if token < FIRST_OPERATOR:
            return str(token - FIRST_NUMBER)
        if token < FIRST_WORD:
            return "+-*=:"[token - FIRST_OPERATOR]
        group, rank = divmod(token - FIRST_WORD, self.words_per_class)
        return f"{OPERATORS[group]}{rank}" if group < len(OPERATORS) else f"{group - len(OPERATORS)}.{rank}"


def _read_steps(core: list[int]) -> list[Step] | None:
    if len(core) % 5:
        return None
    steps: list[Step] = []
    for i in range(0, len(core), 5):
        a, op, b, equals, c = core[i : i + 5]
        numbers_ok = min(a, b, c) >= FIRST_NUMBER and max(a, b, c) < FIRST_OPERATOR
        if not numbers_ok or not FIRST_OPERATOR <= op < EQUALS or equals != EQUALS:
            return None
        steps.append((a - FIRST_NUMBER, OPERATORS[op - FIRST_OPERATOR], b - FIRST_NUMBER, c - FIRST_NUMBER))
    return steps
