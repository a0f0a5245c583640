"""Which papers there are: folders of `papers/` whose `__init__.py` holds a CARD.

Special: a card costs milliseconds, an experiment may import torch, so they are two questions.

    cards()["cegppo"].title
    experiment("cegppo").studies
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

from shared.experiment.contracts import Card, Experiment
from shared.experiment.overrides import suggest
from shared.experiment.results import ROOT


def cards() -> dict[str, Card]:
    """paper -> CARD, by name. Folders starting with `_` and folders without a CARD are none."""
    folders = sorted(path.parent.name for path in (ROOT / "papers").glob("[!_.]*/__init__.py"))
    modules = {name: importlib.import_module(f"papers.{name}") for name in folders}
    return {name: module.CARD for name, module in modules.items() if hasattr(module, "CARD")}


def experiments() -> tuple[str, ...]:
    """Papers that can run: they have an experiment.py."""
    return tuple(sorted(path.parent.name for path in (ROOT / "papers").glob("[!_.]*/experiment.py")))


def card(paper: str) -> Card:
    """CARD of a paper. Raises `UnknownName` with the closest name."""
    known = cards()
    _refuse_unknown(paper, known)
    return known[paper]


def experiment(paper: str) -> Experiment:
    """EXPERIMENT of `papers/<paper>/experiment.py`. Raises `UnknownName` with the closest name."""
    _refuse_unknown(paper, experiments())
    return importlib.import_module(f"papers.{paper}.experiment").EXPERIMENT


def full_setting(paper: str) -> Any:
    """Module `papers/<paper>/full.py`: SIZES and full(size). Raises `UnknownName` with the closest name."""
    _refuse_unknown(paper, sorted(path.parent.name for path in (ROOT / "papers").glob("[!_.]*/full.py")))
    return importlib.import_module(f"papers.{paper}.full")


def _refuse_unknown(paper: str, known: Iterable[str]) -> None:
    if paper not in known:
        raise suggest("paper", paper, known)
