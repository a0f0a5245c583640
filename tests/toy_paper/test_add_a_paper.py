"""docs/add-a-paper.md, done by the letter in a fresh repository: every file it shows, every command it names."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/add-a-paper.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^```\w+ (\S+/\S+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
COMMANDS = "".join(re.findall(r"^```console\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)).splitlines()
KEPT = (
    "shared",
    "eval",
    "papers/__init__.py",
    "papers/__main__.py",
    "papers/_cli.py",
    "papers/_flags.py",
    "tests/__init__.py",
)
KEPT += ("tests/papers/__init__.py", "pyproject.toml", ".gitignore")


def call(folder: Path, command: str, **env: str) -> str:
    """Output of a shell command that must succeed."""
    identity = {f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    everything = os.environ | identity | {"PATH": path, "COLUMNS": "100", "PYTHONDONTWRITEBYTECODE": "1"} | env
    done = subprocess.run(command, shell=True, cwd=folder, env=everything, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """A repository without papers, after the whole page; and what each command printed."""
    folder = tmp_path_factory.mktemp("assay")
    for name in KEPT:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    call(folder, "git init -q && git add -A && git commit -q -m start")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder, {command: call(folder, command) for command in COMMANDS}


pytestmark = pytest.mark.slow


def test_the_page_shows_every_file_it_lists():
    listed = re.findall(r"^\| `((?:papers|tests)/\S+)`", PAGE, re.MULTILINE)
    assert set(listed) <= set(FILES)
    assert len(listed) == 5


def test_the_claims_end_as_the_page_says(walked):
    folder, _ = walked
    judged = {entry["id"]: entry for entry in json.loads((folder / "results/toy/proxy/claims.json").read_text())}
    assert {name: entry["verdict"] for name, entry in judged.items()} == {"late": "reproduced", "early": "contradicted"}
    assert all(entry["n_seeds"] == 10 for entry in judged.values())


def test_readme_and_board_are_filled_and_nothing_is_left_over(walked):
    folder, _ = walked
    readme = (folder / "papers/toy/README.md").read_text()
    assert "**reproduced**" in readme
    assert "**contradicted**" in readme
    assert "| average | 0.0" in readme
    assert "![loss](../../results/toy/proxy/figures/loss.svg)" in readme
    assert (folder / "results/toy/proxy/figures/loss.png").exists()
    assert "Over the first 20 steps" in (folder / "papers/README.md").read_text()
    assert call(folder, "git status --porcelain") == ""


def test_commands_say_what_happened(walked):
    folder, printed = walked
    assert "no committed results yet" in printed["python -m papers run toy --all"]
    assert "promoted: quadratic/average" in printed["python -m papers promote toy"]
    assert "committed results are sound" in printed["python -m papers check toy"]
    assert "1 reproduced, 1 contradicted" in call(folder, "python -m papers list")
    assert "Over the last 100 steps" in call(folder, "python -m papers show toy")
    assert "canaries as recorded (1 studies)" in call(folder, "python -m papers canary check")
    assert "are current" in call(folder, "python -m papers tables --check")


def test_a_fresh_clone_trains_and_agrees(walked, tmp_path):
    folder, _ = walked
    call(tmp_path, f"git clone -q {folder} clone")
    printed = call(tmp_path / "clone", "python -m papers run toy")
    assert "identical" in printed
    assert "5 of 10 seeds so far" in printed
    assert call(tmp_path / "clone", "git status --porcelain") == ""
