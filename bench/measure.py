"""Turns, rounds, medians, and what machine it was. Nothing here knows what is measured."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from shared.experiment import provenance


@dataclass(frozen=True)
class Clock:
    """Seconds of one turn."""

    cpu_s: float
    wall_s: float


def rounds(
    turns: Mapping[str, Callable[[], object]], repetitions: int, between: Callable[[], object] = lambda: None
) -> dict[str, list[Clock]]:
    """Contestant -> one `Clock` per round. Every round gives each contestant one turn and starts with another one.

    `between` runs before every turn, off the clock.
    """
    clocks: dict[str, list[Clock]] = {name: [] for name in turns}
    names = list(turns)
    for repetition in range(repetitions):
        first = repetition % len(names)
        for name in names[first:] + names[:first]:
            between()
            wall, cpu = time.perf_counter(), time.process_time()
            turns[name]()
            clocks[name].append(Clock(time.process_time() - cpu, time.perf_counter() - wall))
    return clocks


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def ratios(ours: Sequence[float], peer: Sequence[float]) -> dict[str, float]:
    """Spread of peer / ours within each round: above 1, ours took less."""
    return spread([theirs / mine for mine, theirs in zip(ours, peer, strict=True)])


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder on the disk of this clone, where runs would write; it goes when left."""
    runs = provenance.ROOT / "runs"
    runs.mkdir(exist_ok=True)
    with TemporaryDirectory(dir=runs, prefix=".bench-") as folder:
        yield Path(folder)


def machine() -> dict[str, Any]:
    """Processor, cores and versions; nothing that names the host."""
    found = provenance.collect()
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "platform": found["platform"],
        "python": found["python"],
        "packages": found["packages"],
        "commit": found["commit"],
        "dirty": found["dirty"],
    }


def processor() -> str:
    """Model name of the first processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def load_average() -> float:
    """Processes that wanted to run, averaged over the last minute."""
    return round(os.getloadavg()[0], 2)
