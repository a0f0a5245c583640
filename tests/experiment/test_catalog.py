"""Papers are found by their CARD; an unknown one comes with the closest name."""

from __future__ import annotations

import sys

import pytest

import papers
from shared.experiment import catalog
from shared.experiment.overrides import UnknownName


@pytest.fixture
def tree(tmp_path, monkeypatch):
    contents = {
        "toy_catalog/__init__.py": "CARD = 'the card'",
        "toy_catalog/experiment.py": "EXPERIMENT = 'the experiment'",
        "_draft/__init__.py": "raise RuntimeError",
        "no_card/__init__.py": "",
    }
    for name, text in contents.items():
        path = tmp_path / "papers" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(catalog, "ROOT", tmp_path)
    monkeypatch.setattr(papers, "__path__", [str(tmp_path / "papers")])
    yield tmp_path
    for name in ("toy_catalog", "toy_catalog.experiment", "no_card"):
        sys.modules.pop(f"papers.{name}", None)


@pytest.mark.usefixtures("tree")
def test_cards_and_experiments_are_found():
    assert catalog.cards() == {"toy_catalog": "the card"}
    assert "papers.toy_catalog.experiment" not in sys.modules
    assert catalog.experiment("toy_catalog") == "the experiment"


@pytest.mark.usefixtures("tree")
def test_a_typo_gets_the_closest_name():
    with pytest.raises(UnknownName, match="did you mean 'toy_catalog"):
        catalog.experiment("toy_katalog")
    with pytest.raises(UnknownName, match="there are: toy_catalog"):
        catalog.experiment("zzz")
