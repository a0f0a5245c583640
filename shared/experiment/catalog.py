"""Which papers there are: folders of `papers/` whose `__init__.py` holds a CARD.

Special: a card costs milliseconds, an experiment may import torch, so they are two questions.

    cards()["cegppo"].title
    experiment("cegppo").studies
"""

from __future__ import annotations

import difflib
import importlib

from shared.experiment.contracts import AssayError, Card, Experiment
from shared.experiment.results import ROOT


class UnknownPaper(AssayError):
    """No folder of that name in papers/."""


def cards() -> dict[str, Card]:
    """paper -> CARD, by name. Folders starting with `_` and folders without a CARD are none."""
    folders = sorted(path.parent.name for path in (ROOT / "papers").glob("[!_.]*/__init__.py"))
    modules = {name: importlib.import_module(f"papers.{name}") for name in folders}
    return {name: module.CARD for name, module in modules.items() if hasattr(module, "CARD")}


def experiments() -> tuple[str, ...]:
    """Papers that can run: they have an experiment.py."""
    return tuple(sorted(path.parent.name for path in (ROOT / "papers").glob("[!_.]*/experiment.py")))


def card(paper: str) -> Card:
    """CARD of a paper. Raises `UnknownPaper` with the closest name."""
    known = cards()
    _refuse_unknown(paper, tuple(known))
    return known[paper]


def experiment(paper: str) -> Experiment:
    """EXPERIMENT of `papers/<paper>/experiment.py`. Raises `UnknownPaper` with the closest name."""
    _refuse_unknown(paper, experiments())
    return importlib.import_module(f"papers.{paper}.experiment").EXPERIMENT


def _refuse_unknown(paper: str, known: tuple[str, ...]) -> None:
    if paper not in known:
        close = difflib.get_close_matches(paper, known, 1)
        hint = f"did you mean {close[0]}?" if close else f"there are: {', '.join(known) or 'none'}"
        raise UnknownPaper(f"no paper {paper}: {hint}")
