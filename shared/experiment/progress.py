"""What a person sees while runs go on: live bars on a terminal, one line per event in a pipe."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from shared.experiment.pool import Entry

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

SHOWN_RUNS = 3


class Estimate:
    """Time left: declared CPU-seconds, corrected by what runs of the same study and the machine's pace turn out to be.

    A few short runs, which are mostly start-up, barely move the pace: declared costs count as `PRIOR_S` of experience.
    """

    PRIOR_S = 60.0
    PRIOR_SHARE = 0.05

    def __init__(self, entries: Sequence[Entry], workers: int) -> None:
        self._entries = entries
        self._workers = workers

    def seconds_left(self) -> float:
        """Wall seconds until all entries have ended."""
        finished = [entry for entry in self._entries if entry.ending == "done"]
        running = [entry for entry in self._entries if entry.started and entry.ending is None and _share(entry)]
        declared = sum(entry.cost for entry in finished) + sum(entry.cost * _share(entry) for entry in running)
        spent = sum(entry.seconds for entry in finished) + sum(_age(entry) for entry in running)
        pace = (self.PRIOR_S + spent) / (self.PRIOR_S + declared)
        left = [self._left(entry, pace) for entry in self._entries if entry.ending is None]
        return max([sum(left) / self._workers, *left], default=0.0)

    def _left(self, entry: Entry, pace: float) -> float:
        peers = [peer.seconds for peer in self._entries if peer.group == entry.group and peer.ending == "done"]
        expected = sum(peers) / len(peers) if peers else entry.cost * pace
        if not entry.started or not _share(entry):
            return expected
        # The first per cent of a run is start-up and says little about the rest.
        whole = (_age(entry) + self.PRIOR_SHARE * expected) / (_share(entry) + self.PRIOR_SHARE)
        return max(0.0, whole - _age(entry))


def _share(entry: Entry) -> float:
    return entry.done / entry.total if entry.total else 0.0


def _age(entry: Entry) -> float:
    return time.monotonic() - entry.started


def duration(seconds: float) -> str:
    """`8 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Lines:
    """One line per event, no control characters."""

    def __init__(self, console: Console, entries: Sequence[Entry], workers: int) -> None:
        self._console = console
        self._estimate = Estimate(entries, workers)
        self._total = len(entries)
        self._ended = 0

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def started(self, entry: Entry) -> None:
        self.note(f"[start]  {entry.key}")

    def progressed(self, entry: Entry) -> None:
        return None

    def ended(self, entry: Entry) -> None:
        self._ended += 1
        rest = f", about {duration(self._estimate.seconds_left())} left" if self._ended < self._total else ""
        count = f"({self._ended}/{self._total}{rest})"
        if entry.ending == "done":
            self.note(f"[done]   {entry.key} in {entry.seconds:.1f} s {count}")
        else:
            self.note(f"[{entry.ending}] {entry.key}: {entry.error} {count}")

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class Bars:
    """One bar per study with the arms and seeds that run now and their share, and the time left in all."""

    def __init__(self, console: Console, entries: Sequence[Entry], workers: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._entries = entries
        self._estimate = Estimate(entries, workers)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("[dim]{task.fields[now]}", markup=True),
            console=console,
        )
        self._groups: dict[str, TaskID] = {}
        for group in dict.fromkeys(entry.group for entry in entries):
            count = sum(entry.group == group for entry in entries)
            self._groups[group] = self._progress.add_task(group, total=count, now="")
        self._all = self._progress.add_task("[bold]all", total=len(entries), now="")

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def started(self, entry: Entry) -> None:
        self._refresh(entry)

    def progressed(self, entry: Entry) -> None:
        self._refresh(entry)

    def ended(self, entry: Entry) -> None:
        if entry.ending == "failed":
            self.note(f"{entry.key} failed: {entry.error}")
        self._refresh(entry)

    def note(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def _refresh(self, changed: Entry) -> None:
        peers = [entry for entry in self._entries if entry.group == changed.group]
        self._show(self._groups[changed.group], peers, self._running_text(peers))
        self._show(self._all, self._entries, f"about {duration(self._estimate.seconds_left())} left")

    def _show(self, bar: Any, entries: Sequence[Entry], now: str) -> None:
        ended = sum(entry.ending is not None for entry in entries)
        part = sum(_share(entry) for entry in entries if entry.ending is None)
        # rich prints completed as an integer, the fraction moves the bar between two endings
        self._progress.update(bar, completed=ended + min(part, 0.999 * (len(entries) - ended)), now=now)

    @staticmethod
    def _running_text(entries: Sequence[Entry]) -> str:
        running = [entry for entry in entries if entry.started and entry.ending is None]
        shown = [f"{entry.key.removeprefix(entry.group + '/')} {_share(entry):.0%}" for entry in running[:SHOWN_RUNS]]
        return ", ".join(shown) + (f" +{len(running) - SHOWN_RUNS}" if len(running) > SHOWN_RUNS else "")


def display(console: Console, entries: Sequence[Entry], workers: int) -> Lines | Bars:
    """Bars on a terminal, lines elsewhere."""
    return (Bars if console.is_terminal else Lines)(console, entries, workers)
