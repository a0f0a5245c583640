"""The code hash moves with what can change a number, and with nothing else."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.experiment.codehash import CodeUnknown, function_hash, locate, reached_modules, study_hash
from shared.experiment.contracts import Grid, Study

FILES = {
    "__init__.py": '"""A paper."""\n',
    "experiment.py": '''
"""Declarations."""
from papers_toy.figures import draw
from papers_toy.helpers import scale
from papers_toy.runs import train

REGISTRY = {}
SEEDS = (0, 1)
FACTOR = 2

def run(context):
    """Runs."""
    return {"x": scale(FACTOR) + train(context)}

def arms():
    return {"a": SEEDS, "figure": draw}
''',
    "figures.py": "def draw():\n    return 1\n",
    "helpers.py": "def scale(x):\n    from papers_toy import deep\n    return deep.value() * x\n",
    "deep.py": "def value():\n    return 3\n",
    "runs.py": "from .nested.worker import work\n\ndef train(context):\n    return work()\n",
    "nested/__init__.py": "",
    "nested/worker.py": "import importlib\n\ndef work():\n    return importlib.import_module(f'{__package__}.x')\n",
    "nested/plugin.py": "VALUE = 1\n",
    "method.py": "def loss():\n    return 0\n",
    "cli.py": "def main():\n    return 0\n",
}


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "papers_toy"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "papers_toy"]:
        del sys.modules[name]


def study() -> Study:
    module = importlib.import_module("papers_toy.experiment")
    return Study("s", "?", {"a": None}, module.run, {"proxy": Grid((0,))})


def now() -> str:
    return study_hash("toy", study(), {})


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new) + "\n")


def test_closure_is_what_the_run_can_reach(toy: Path) -> None:
    reached = set(reached_modules("toy", study()))
    inside = {name.removeprefix("papers_toy.") for name in reached}
    assert {"experiment", "helpers", "deep", "runs", "nested.worker", "nested.plugin", "method"} <= inside
    assert not {"figures", "cli"} & inside


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("experiment.py", "FACTOR = 2", "FACTOR = 4"),
        ("experiment.py", "REGISTRY = {}", "REGISTRY = {}\nREGISTRY['x'] = arms"),
        ("helpers.py", "* x", "+ x"),
        ("deep.py", "3", "4"),
        ("nested/worker.py", "return", "x = 1; return"),
        ("nested/plugin.py", "1", "2"),
        ("method.py", "0", "1"),
    ],
)
def test_what_changes_a_number_changes_the_hash(toy: Path, name: str, old: str, new: str) -> None:
    before = now()
    edit(toy / name, old, new)
    assert now() != before


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("experiment.py", '"""Runs."""', '"""Runs better."""  # really'),
        ("experiment.py", "SEEDS = (0, 1)", "SEEDS = (0, 1, 2)"),
        ("figures.py", "1", "2"),
        ("cli.py", "0", "1"),
        ("__init__.py", "A paper.", "The paper."),
        ("deep.py", "def", "\n# comment\n\ndef"),
    ],
)
def test_what_cannot_change_a_number_does_not(toy: Path, name: str, old: str, new: str) -> None:
    before = now()
    edit(toy / name, old, new)
    assert now() == before


def test_artifacts_are_part_of_the_identity(toy: Path) -> None:
    base = study()
    with_artifact = Study(base.name, "?", base.arms, base.run, base.scales, artifacts=("policy",))
    hashes = {study_hash("toy", with_artifact, {"policy": address}) for address in ("x", "y")}
    assert len(hashes) == 2


def test_syntax_errors_are_named(toy: Path) -> None:
    run_study = study()
    (toy / "deep.py").write_text("def value(:\n")
    with pytest.raises(CodeUnknown, match=r"deep\.py, line 1"):
        study_hash("toy", run_study, {})


def test_functions_without_a_name_are_refused() -> None:
    with pytest.raises(CodeUnknown, match="define it with `def`"):
        function_hash(lambda: 1)


def test_nothing_is_imported_to_find_a_module() -> None:
    assert locate("shared.experiment.plots_that_do_not_exist") is None
    assert locate("shared.experiment.contracts") is not None
    assert locate("shared.experiment") is not None


def test_each_file_is_parsed_once() -> None:
    """Several studies of a paper reach the same hundred files, and looking at them starts every launch."""
    from shared.experiment import codehash

    codehash._tree.cache_clear()
    codehash._select.cache_clear()
    found = {**codehash._closure({"shared.rl.trainer": None}), **codehash._closure({"shared.training.sft": None})}
    assert len(found) > 20
    assert codehash._tree.cache_info().misses == codehash._select.cache_info().misses == len(found)
