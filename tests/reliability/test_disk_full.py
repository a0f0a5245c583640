"""The disk is full at each system call of a save in turn: one sentence that names the file, and nothing valid is lost.

`test_small_disk` does the same to whole runs, with disks that are really full.
"""

import os
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.experiment import artifacts
from shared.experiment import promote as promotion
from shared.experiment.contracts import Artifact
from shared.experiment.files import Unwritable, write_json
from shared.experiment.promote import promote
from shared.experiment.records import RunDirectory
from shared.training.checkpoint import CheckpointNotWritten, Checkpoints, load_weights, save_weights
from tests.experiment.fake_records import clear_difference, toy_experiment, write_run, write_runs
from tests.reliability.faults import NEEDS_SPACE, Faults
from tests.reliability.subjects import PROVENANCE
from tests.training.test_checkpoint import assert_equal, state


def full_at_every_call(folder: Path, save: Callable[[], Any], look: Callable[[], Any]) -> int:
    """Save once; then once for each call of it that needs space, where the disk is full from that call on.

    `look` checks what each save left. Returns how many calls there are.
    """
    with Faults(folder) as faults:
        save()
    look()
    calls = [number for number, line in enumerate(faults.log) if line.split()[0] in NEEDS_SPACE]
    for number in calls:
        with (
            Faults(folder, full_from=number),
            pytest.raises(Unwritable, match=rf"Cannot write (to )?{folder}.*No space left.*free space"),
        ):
            save()
        look()
    return len(calls)


def test_a_checkpoint(tmp_path):
    states = {step: state(step) for step in (1, 2)}
    checkpoints = Checkpoints(tmp_path / "c")
    kept = checkpoints.save(1, states[1])

    def look() -> None:
        found = Checkpoints(tmp_path / "c").latest()
        assert found is not None
        assert_equal(found[1], states[found[0]])
        assert kept.exists()
        for path in (tmp_path / "c").glob("step-00000002*"):
            path.unlink()
        assert os.listdir(tmp_path / "c") == [kept.name]

    assert full_at_every_call(tmp_path, lambda: checkpoints.save(2, states[2]), look) >= 5
    with Faults(tmp_path, full_from=0), pytest.raises(CheckpointNotWritten):
        checkpoints.save(2, states[2])


def test_weights_and_small_files(tmp_path):
    weights, place, small = {"w": torch.arange(6.0)}, tmp_path / "w.safetensors", tmp_path / "small.json"

    def save() -> None:
        save_weights(place, weights)
        write_json(small, [1])

    def look() -> None:
        assert_equal(load_weights(place), weights)
        assert small.read_text() == "[\n 1\n]\n"
        assert len(os.listdir(tmp_path)) == 2

    assert full_at_every_call(tmp_path, save, look) >= 8


def test_a_record(tmp_path):
    paths: Iterator[Path] = (tmp_path / f"run{number}" for number in count())
    tried: list[Path] = []

    def write(path: Path) -> None:
        with RunDirectory.open(path, {"lr": 1}, 0, provenance=PROVENANCE) as run:
            for step in range(3 if run.completed is None else 0):
                run.log(step, x=float(step))
                run.time(step, s=1.0)
            assert run.completed or len(run.rows()) == 3
            if run.completed is None:
                run.finish({"x": 2.0})

    def save() -> None:
        tried.append(next(paths))
        write(tried[-1])

    def look() -> None:
        """It goes on in the same folder and ends like the first."""
        write(tried[-1])
        for name in ("metrics.jsonl", "summary.json"):
            assert (tried[-1] / name).read_bytes() == (tried[0] / name).read_bytes()
        assert not [name for name in os.listdir(tried[-1]) if name.startswith(".")]

    assert full_at_every_call(tmp_path, save, look) > 40
    assert not [name for name in os.listdir(tmp_path) if "damaged" in name]


def build_weights(config: dict[str, int], folder: Path) -> None:
    save_weights(folder / "w.safetensors", {"w": torch.arange(config["n"])})


def test_an_artifact(tmp_path, monkeypatch):
    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path))
    monkeypatch.setattr(artifacts, "function_hash", lambda _: "code")
    tried: list[Artifact] = []

    def save() -> None:
        tried.append(Artifact("weights", build_weights, {"n": len(tried)}))
        artifacts.build(tried[-1], "smoke")

    def look() -> None:
        place = artifacts.address(tried[-1], "smoke")
        artifacts.find(place)  # raises if there is something that is not whole
        assert set(load_weights(artifacts.build(tried[-1], "smoke").path / "w.safetensors")) == {"w"}

    assert full_at_every_call(tmp_path, save, look) > 10
    assert not list((tmp_path / "artifacts").glob("*.damaged*"))


def test_a_promotion(tmp_path, monkeypatch):
    monkeypatch.setattr(promotion, "in_history", lambda commit, root: True)
    experiment = toy_experiment(seeds=tuple(range(5)))
    write_runs(tmp_path / "runs", experiment, clear_difference)
    promote(experiment, root=tmp_path)
    folder = tmp_path / "results/toy/proxy/main"

    def contents() -> dict[str, list[bytes]]:
        return {
            arm.name: [path.read_bytes() for path in sorted(arm.iterdir())] for arm in folder.iterdir() if arm.is_dir()
        }

    before = contents()
    for seed in range(5):
        (tmp_path / f"runs/toy/proxy/main/a/seed{seed}").rename(tmp_path / f"gone{seed}")
        write_run(tmp_path / "runs", experiment, "a", seed, {"score": 7.0})
    seen = []
    full_at_every_call(
        tmp_path / "results", lambda: promote(experiment, root=tmp_path), lambda: seen.append(contents())
    )
    assert before["a"] != seen[0]["a"]
    assert all(content == seen[0] for content in seen)
