"""Artifacts: built once, checked, resumed, rebuilt when damaged."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from shared.experiment import artifacts
from shared.experiment.artifacts import ArtifactDamaged, address, build, cache_root, config_at, find
from shared.experiment.contracts import Artifact
from tests.experiment.toylab.runs import Start, build_start

START = Artifact("start", build_start, Start(), overrides={"smoke": {"x": 1.0}})
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path))
    return tmp_path / "artifacts"


def attempts(path: Path) -> int:
    return len((path / "attempts").read_text())


def test_built_once_and_found_again(cache: Path) -> None:
    assert find(address(START, "proxy")) is None
    first = build(START, "proxy")
    assert first.path.parent == cache == cache_root()
    assert json.loads((first.path / "start.json").read_text()) == 5.0
    assert build(START, "proxy") == first == find(first.address)
    assert attempts(first.path) == 1
    assert not list(cache.glob("*.partial"))


def test_the_address_is_name_config_scale_and_code() -> None:
    assert config_at(START, "smoke") == Start(x=1.0)
    variants = [
        address(START, "proxy"),
        address(START, "smoke"),
        address(replace(START, name="other"), "proxy"),
        address(replace(START, config=Start(x=2.0)), "proxy"),
        address(replace(START, build=artifacts.build), "proxy"),
    ]
    assert len(set(variants)) == 5
    assert address(START, "proxy") == address(START, "gpu")


@pytest.mark.parametrize("damage", ["truncate", "delete", "manifest"])
def test_a_damaged_file_is_named_and_the_artifact_rebuilt(cache: Path, damage: str) -> None:
    built = build(START, "proxy")
    name = "manifest.json" if damage == "manifest" else "start.json"
    if damage == "delete":
        (built.path / name).unlink()
    else:
        (built.path / name).write_text("{")
    with pytest.raises(ArtifactDamaged, match=name):
        find(built.address)
    heard: list[str] = []
    assert build(START, "proxy", heard.append) == built
    assert name in heard[0]
    assert (cache / f"{built.address}.damaged-1").is_dir()


def failing_build(config: Start, directory: Path) -> None:
    """Fails at the first attempt and goes on at the second."""
    if not (directory / "half").exists():
        (directory / "half").write_text("x")
        raise RuntimeError("interrupted")
    (directory / "run").mkdir()
    (directory / "run" / "timing").write_text("now")
    (directory / "whole").write_text("xx")


def test_an_interrupted_build_goes_on_where_it_was() -> None:
    artifact = Artifact("slow", failing_build, Start())
    with pytest.raises(RuntimeError, match="interrupted"):
        build(artifact, "proxy")
    assert find(address(artifact, "proxy")) is None
    built = build(artifact, "proxy")
    files = json.loads((built.path / "manifest.json").read_text())["files"]
    assert set(files) == {"half", "whole"}  # the builder's own record holds clocks


def build_in_child(out: str) -> None:
    lines: list[str] = []
    built = build(Artifact("start", build_start, Start(sleep=0.5)), "proxy", lines.append)
    Path(out).write_text(json.dumps([str(built.path), built.content, lines]))


def test_two_processes_build_once_and_the_second_says_that_it_waits(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    outs = [tmp_path / "a", tmp_path / "b"]
    processes = [context.Process(target=build_in_child, args=(str(out),)) for out in outs]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    results = [json.loads(out.read_text()) for out in outs]
    assert results[0][:2] == results[1][:2]
    assert attempts(Path(results[0][0])) == 1
    assert sum("Waiting for process" in line for _, _, lines in results for line in lines) == 1


def test_unwritable_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path / "file"))
    with pytest.raises(artifacts.AssayError, match="Cannot write to"):
        build(START, "proxy")


def test_the_address_does_not_depend_on_the_process() -> None:
    code = (
        "from tests.experiment.test_artifacts import START; from shared.experiment.artifacts import address;"
        "print(address(START, 'proxy'))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == address(START, "proxy")
