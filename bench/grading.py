"""Speed of the math grader beside plain math-verify on the same responses. Run: python -m bench.grading

Samples are simulated: 16 a problem, ten that spell its gold, six that give golds of other problems of the set. Ours is
one batch on two workers, their start included; math-verify is one process on every 40th response, its golds parsed
beforehand.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import random
import resource
import time

import math_verify

from shared.data.catalog import resolve
from shared.grading.math import MathGrader
from shared.grading.rules import RULES

SETS = {"aime24": "math/aime24", "math500": "math/math500"}
SAMPLES, CORRECT, EVERY, WORKERS = 16, 10, 40, 2
LONG = 60_000


def workload(task: str) -> tuple[list[str], list[str]]:
    """(gold, response) of every sample, shuffled with a fixed seed."""
    path = resolve(SETS[task])
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
        golds = [str(json.loads(line)["answer"]) for line in lines]
    rng = random.Random(0)
    pairs = [(gold, gold) for gold in golds for _ in range(CORRECT)]
    pairs += [(gold, rng.choice(golds)) for gold in golds for _ in range(SAMPLES - CORRECT)]
    rng.shuffle(pairs)
    return [gold for gold, _ in pairs], [f"So the answer is $\\boxed{{ {answer} }}$." for _, answer in pairs]


def ours(task: str, golds: list[str], responses: list[str]) -> str:
    """Answers a second of wall time, and a CPU-second of all processes."""
    start, cpu = time.perf_counter(), _cpu_s()
    with MathGrader(workers=WORKERS) as grader:
        grader.grade(golds, responses, RULES[task])
    wall, cpu = time.perf_counter() - start, _cpu_s() - cpu
    return f"{len(golds) / wall:,.0f} a second ({len(golds) / cpu:,.0f} a CPU-second)"


def _cpu_s() -> float:
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def plain(golds: list[str], responses: list[str]) -> float:
    """Answers a CPU-second of math-verify as its README uses it."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    parsed = [math_verify.parse(f"\\boxed{{{gold}}}", parsing_timeout=0) for gold in golds[::EVERY]]
    start = time.process_time()
    for gold, response in zip(parsed, responses[::EVERY], strict=True):
        math_verify.verify(gold, math_verify.parse(response, parsing_timeout=0), timeout_seconds=None)
    return len(parsed) / (time.process_time() - start)


def main() -> None:
    print(f"load average {os.getloadavg()[0]:.1f}; {WORKERS} workers")
    filler = "Let $x = \\frac{1}{2}$ and try again. "
    for task in SETS:
        golds, responses = workload(task)
        rate = ours(task, golds, responses)
        long = [filler * (LONG // len(filler)) + response for response in responses[:2000]]
        long_rate = ours(task, golds[:2000], long)
        print(
            f"{task}: {len(golds)} answers, {rate}; of 60 kB {long_rate}; "
            f"plain math-verify {plain(golds, responses):,.0f} a CPU-second"
        )


if __name__ == "__main__":
    main()
