"""The rules of .ci/house.py: each finds what it is for, and spares what looks like it."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The rules, applied to an empty repository."""
    spec = importlib.util.spec_from_file_location("house", ROOT / ".ci" / "house.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def long_function(lines: int) -> str:
    return "def f():\n" + '    """Docstrings\n    do not count."""\n' + "    pass\n" * lines


ROOTED = "/" + "home"  # written apart, because this file is checked too


@pytest.mark.parametrize(
    ("name", "text", "finding"),
    [
        ("a.py", "x = 1\n" * 401, "401 lines"),
        ("a.py", "x = 1\n" * 400, None),
        ("a.py", long_function(51), "f has 51 lines"),
        ("a.py", long_function(50), None),
        ("a.md", f"see {ROOTED}/someone/notes", "a path of one machine"),
        ("a.md", f"see docs{ROOTED}/someone and ~{ROOTED}/x", None),
        ("a.txt", "--extra-index" + "-url https://example.org", "package registry"),
        ("a.txt", "https://example.org/" + "simple", "package registry"),
        ("a.txt", "https://example.org/simplest", None),
        ("model.pt", "", "not committed"),
        ("a.svg", "x" * (1 << 20) + "x", "bytes, at most"),
    ],
)
def test_rule(house: ModuleType, tmp_path: Path, name: str, text: str, finding: str | None) -> None:
    (tmp_path / name).write_text(text)
    found = list(house.violations())
    assert [finding in line for line in found] == ([True] if finding else [])


def test_results_of_a_paper_are_small_together(house: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "results" / "toy").mkdir(parents=True)
    for name in "ab":
        (tmp_path / "results" / "toy" / name).write_text("x" * 600_000)
    (found,) = house.violations()
    assert found.startswith("results/toy: 1200000 bytes")


def test_ignored_files_are_not_looked_at(house: ModuleType, tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text("runs/\n")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "weights.pt").touch()
    assert list(house.violations()) == []
