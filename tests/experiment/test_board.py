"""`papers list` and `papers show`: what they print, and that they stay light."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from shared.experiment import board, catalog
from shared.experiment.contracts import Card
from shared.experiment.overrides import UnknownName

CARD = Card(
    "toy", "A toy", "2501.00001", ("b beats a", "[a] is slow"), ("smoke", "proxy"), {"headline": 1234, "grid": 9}
)
ENTRY = {"id": "x", "statement": "b beats a", "strength": "must", "verdict": "contradicted", "effect": 1}


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(catalog, "cards", lambda: {"toy": CARD})
    folder = tmp_path / "results/toy/proxy"
    folder.mkdir(parents=True)
    (folder / "claims.json").write_text(json.dumps([ENTRY, ENTRY | {"verdict": "reproduced"}, ENTRY]))
    return tmp_path


def test_list_counts_verdicts(root, capsys):
    board.list_papers(root=root)
    printed = capsys.readouterr().out
    assert "1 reproduced, 2 contradicted" in printed
    assert "1,234" in printed
    board.list_papers(root=root / "empty")
    assert "no results yet" in capsys.readouterr().out


def test_list_for_machines(root, capsys):
    board.list_papers(as_json=True, root=root)
    (row,) = json.loads(capsys.readouterr().out)
    assert row["verdicts"] == {"reproduced": 1, "contradicted": 2, "unresolved": 0}
    assert row["paper"] == "toy"


def test_show_tells_claims_verdicts_and_costs(root, capsys):
    board.show_paper("toy", root=root)
    printed = capsys.readouterr().out
    assert "2. [a] is slow" in printed
    assert "contradicted  x (must): b beats a" in printed
    assert "headline 1,234, grid 9" in printed
    board.show_paper("toy", root=root / "empty")
    assert "No committed verdicts yet" in capsys.readouterr().out


def test_show_for_machines(root, capsys):
    board.show_paper("toy", as_json=True, root=root)
    shown = json.loads(capsys.readouterr().out)
    assert shown["results"]["proxy"][0]["verdict"] == "contradicted"
    assert shown["claims"] == list(CARD.claims)


@pytest.mark.usefixtures("root")
def test_an_unknown_paper_gets_a_suggestion():
    with pytest.raises(UnknownName, match="did you mean 'toy"):
        board.show_paper("tooy")


def test_nothing_heavy_is_imported():
    code = (
        "import sys, shared.experiment.board, shared.experiment.tables, shared.experiment.report, "
        "shared.experiment.promote, shared.experiment.canary, shared.experiment.plots\n"
        "heavy = {'torch', 'numpy', 'scipy', 'matplotlib', 'transformers', 'megatron', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
