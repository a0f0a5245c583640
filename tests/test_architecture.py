"""The house rules that keep Assay quick to start and its papers apart (docs/architecture.md). Runs in seconds."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "transformers", "megatron", "scipy", "vllm", "transformer_engine", "datasets", "matplotlib")
PAPERS = sorted(path.parent for path in ROOT.glob("papers/[!_]*/__init__.py"))
METHODS = sorted(ROOT.glob("papers/[!_]*/method.py"))
EXPERIMENTS = sorted(ROOT.glob("papers/[!_]*/experiment.py"))
SECTIONS = ("Claim", "Run", "Results", "Deviations", "Paper versus code", "Sources")
NVIDIA_RUNTIME = re.compile(r"nvidia-|cuda-|triton$")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def run_python(*args: str) -> tuple[str, float]:
    """Output and CPU-seconds (user + system, children included) of `python ARGS` in the root of the clone."""
    with subprocess.Popen([sys.executable, *args], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, output
    return output, usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("module", ["shared", "eval", "papers", "shared.experiment.contracts", "papers.__main__"])
def test_import_is_light(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({{name.split('.')[0] for name in sys.modules}} & set({HEAVY!r})))"
    assert run_python("-c", code)[0].split() == []


@pytest.mark.parametrize("card", PAPERS, ids=lambda path: path.name)
def test_card_is_light_and_names_its_folder(card: Path) -> None:
    code = f"import sys, papers.{card.name} as p; print(p.CARD.paper, *(m for m in {HEAVY!r} if m in sys.modules))"
    assert run_python("-c", code)[0].split() == [card.name]


# CPU time, not wall time: other work on the machine stretches the wall clock of a process, not its CPU time, and these
# commands read a few small files, so that on an idle machine the two agree. Best of three drops cold file caches.
@pytest.mark.parametrize(
    "arguments", [["--help"], ["list"], *(["show", path.name] for path in PAPERS[:1])], ids=" ".join
)
def test_first_look_answers_within_half_a_second(arguments: list[str]) -> None:
    assert min(run_python("-m", "papers", *arguments)[1] for _ in range(3)) < 0.5


@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_method_is_a_small_leaf(method: Path) -> None:
    """A method.py can be copied into another project: it runs without Assay and needs torch and numpy at most."""
    text = method.read_text()
    assert text.count("\n") < 200
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import is an import of ours"
            imported.add((node.module or "").split(".")[0])
    assert imported <= {"torch", "numpy", *sys.stdlib_module_names}


def test_methods_import_with_our_packages_blocked() -> None:
    code = f"""
import importlib.util, sys
sys.modules.update(dict.fromkeys(["papers", "shared", "eval"]))
for path in {[str(path) for path in METHODS]!r}:
    spec = importlib.util.spec_from_file_location("method", path)
    sys.modules["method"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
"""
    run_python("-c", code)


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=name_of)
def test_readme_of_a_paper_has_its_sections(experiment: Path) -> None:
    headings = re.findall(r"^#{2,3} (.+)$", (experiment.parent / "README.md").read_text(), re.MULTILINE)
    missing = [section for section in SECTIONS if not any(section.lower() in heading.lower() for heading in headings)]
    assert not missing, f"no heading of papers/{experiment.parent.name}/README.md contains {missing}"


def test_every_paper_folder_is_complete() -> None:
    folders = [path for path in ROOT.glob("papers/[!_]*") if path.is_dir() and any(path.glob("*.py"))]
    missing = [name_of(p / file) for p in folders for file in ("__init__.py", "README.md") if not (p / file).exists()]
    assert not missing


def test_every_folder_of_python_files_is_a_package() -> None:
    """Without __init__.py two test files of one name collide, and packages.find would lose a folder."""
    folders = {path.parent for top in ("papers", "shared", "eval", "tests") for path in ROOT.glob(f"{top}/**/*.py")}
    assert not [name_of(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()]


def test_core_stays_small() -> None:
    """At most 45 packages come with `pip install -e .` (torch's CUDA wheels, a matter of the machine, not counted)."""
    seen: set[str] = set()
    todo = [
        Requirement(line) for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    ]
    while todo:
        requirement = todo.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name in seen or NVIDIA_RUNTIME.match(name):
            continue
        seen.add(name)
        extras = requirement.extras or {""}
        for line in importlib.metadata.requires(name) or []:
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(needed)
    assert len(seen) <= 45, sorted(seen)
