"""Each import contract of pyproject.toml fails when it is violated, and holds with no paper, one or several."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"
CLEAN = {
    "papers/one/method.py": "import math",
    "papers/one/experiment.py": "import shared.rl, eval.tasks\nfrom papers.one import method",
    "papers/two/method.py": "import math",
    "papers/two/experiment.py": "from papers.one.method import math\nfrom papers.two import method",
    "shared/rl.py": "import math",
    "eval/tasks.py": "import shared.rl",
}


def lint(folder: Path, files: dict[str, str]) -> tuple[bool, str]:
    """Whether the contracts hold in a tree of `files`, and what import-linter prints."""
    shutil.copy(ROOT / "pyproject.toml", folder)
    for top in ("papers", "eval", "shared"):
        (folder / top).mkdir()
        (folder / top / "__init__.py").touch()
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).parent.joinpath("__init__.py").touch()
        (folder / name).write_text(text)
    command = [sys.executable, "-c", LINT, "--no-cache", "--no-logo"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return result.returncode == 0, result.stdout


@pytest.mark.parametrize("papers", [(), ("papers/one",), ("papers",)], ids=["none", "one", "two"])
def test_contracts_hold(tmp_path: Path, papers: tuple[str, ...]) -> None:
    files = {
        name: text for name, text in CLEAN.items() if name.split("/")[0] != "papers" or name.split("/")[1] in papers
    }
    if papers == ("one",):
        files["papers/one/experiment.py"] = "from papers.one import method"
    held, output = lint(tmp_path, files)
    assert held, output
    assert "3 kept, 0 broken" in output


@pytest.mark.parametrize(
    ("file", "violation", "contract"),
    [
        ("shared/rl.py", "import eval.tasks", "papers import eval and shared"),
        ("eval/tasks.py", "def late():\n    from papers.one import method", "papers import eval and shared"),
        ("papers/one/method.py", "import shared.rl", "a method.py is a leaf"),
        ("papers/two/method.py", "from papers.one.experiment import method", "a method.py is a leaf"),
        ("papers/two/experiment.py", "import papers.one.experiment", "no experiment.py imports another"),
    ],
)
def test_violation_is_found(tmp_path: Path, file: str, violation: str, contract: str) -> None:
    held, output = lint(tmp_path, {**CLEAN, file: violation})
    assert not held
    broken = [line for line in output.splitlines() if line.endswith("BROKEN")]
    assert any(line.startswith(contract) for line in broken), output
