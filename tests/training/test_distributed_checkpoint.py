"""Distributed checkpoints: any layout loads any other's; nothing damaged, foreign or half-written is ever used."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.experiment.contracts import NonFinite
from shared.megatron.init import initialize
from shared.megatron.layout import Layout
from shared.training.checkpoint import CheckpointNotWritten
from shared.training.distributed_checkpoint import DistributedCheckpoints
from shared.training.manifest import (
    CheckpointDamaged,
    CheckpointMismatch,
    ForeignCheckpoint,
    OtherCheckpointFormat,
    Tokenizer,
    UnusableCheckpoint,
    damaged_files,
    read_stored,
)
from shared.training.torch_dist import Share
from tests.ranks import PRELOAD, run_ranks
from tests.training.small_states import CONTENTS, MODEL, on_two_ranks, save, save_and_die, state


def value_of(checkpoints: DistributedCheckpoints, stored: Any) -> float:
    initialize("cpu")
    loaded = checkpoints.load(stored, state(0.0), model=MODEL, precision="fp32", tokenizer=None)
    assert torch.equal(loaded["split"], torch.full((12,), loaded["number"]))
    assert torch.equal(loaded["both"], torch.full((3,), -loaded["number"]))
    return loaded["number"]


def steps(directory: Path) -> list[int]:
    """Steps of everything that looks like a checkpoint; anything else but hidden folders is a mistake."""
    names = sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))
    return [read_stored(directory / name).step for name in names]


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Path:
    """A folder with checkpoints of steps 1, 2 and 3; copy it before damaging it."""
    folder = tmp_path_factory.mktemp("three") / "checkpoints"
    checkpoints = DistributedCheckpoints(folder, keep=3)
    for step in (1, 2, 3):
        save(checkpoints, step)
    return folder


@pytest.fixture
def copied(three, tmp_path) -> Path:
    return Path(shutil.copytree(three, tmp_path / "checkpoints"))


def of_step(folder: Path, step: int) -> Path:
    return next(folder.glob(f"step-{step:08d}-*"))


def test_round_trip_and_retention(tmp_path):
    checkpoints = DistributedCheckpoints(tmp_path / "c", keep=2)
    assert checkpoints.latest() is None
    assert checkpoints.best() is None
    assert checkpoints.describe_latest() == "none"
    for step in (9, 10, 100):
        save(checkpoints, step, asynchronous=step == 10)
    fresh = DistributedCheckpoints(tmp_path / "c")
    latest = fresh.latest()
    assert latest is not None
    assert (latest.step, latest.layout, value_of(fresh, latest)) == (100, Layout(), 100.0)
    assert steps(tmp_path / "c") == [10, 100]
    assert fresh.describe_latest() == str(latest.path)
    assert latest.manifest["contents"]["model"]["hidden_size"] == 16
    # The same step again replaces its former self, not the one before.
    save(checkpoints, 100)
    assert steps(tmp_path / "c") == [10, 100]


def test_the_best_is_kept_beside_the_newest(tmp_path):
    checkpoints = DistributedCheckpoints(tmp_path, keep=1, keep_best=True)
    for step, metric in enumerate([3.0, 1.5, None, 1.5, 2.0], start=1):
        save(checkpoints, step, metric)
    best = DistributedCheckpoints(tmp_path).best()
    assert best is not None
    assert (best.step, best.metric) == (2, 1.5)
    assert steps(tmp_path) == [2, 5]
    with pytest.raises(NonFinite, match="metric of the checkpoint is nan"):
        save(checkpoints, 6, float("nan"))


def test_an_asynchronous_save_holds_what_was_there_when_it_was_called(tmp_path, monkeypatch):
    initialize("cpu")
    overwritten, write = threading.Event(), Share.write

    def write_late(share: Share) -> Any:
        assert overwritten.wait(30)
        return write(share)

    monkeypatch.setattr(Share, "write", write_late)
    checkpoints = DistributedCheckpoints(tmp_path)
    live = state(1.0)
    tensors = [live["split"].data, live["both"].data]
    checkpoints.save(1, live, CONTENTS, asynchronous=True)
    assert steps(tmp_path) == []
    for tensor in tensors:
        tensor.zero_()
    overwritten.set()
    while not steps(tmp_path):
        checkpoints.poll()
    written = next(of_step(tmp_path, 1).glob("__0_*")).read_bytes()
    save(DistributedCheckpoints(tmp_path / "synchronous"), 1)
    assert next(of_step(tmp_path / "synchronous", 1).glob("__0_*")).read_bytes() == written
    shutil.rmtree(tmp_path / "synchronous")
    assert value_of(checkpoints, checkpoints.latest()) == 1.0


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_changed_byte_anywhere_is_found_and_named(three, copied, data):
    shutil.rmtree(copied)
    shutil.copytree(three, copied)
    newest = of_step(copied, 3)
    file = data.draw(st.sampled_from(sorted(newest.iterdir())))
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content)
    checkpoints = DistributedCheckpoints(copied)
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.step == 2
    assert str(file) in str(checkpoints.damaged[newest])


@pytest.mark.parametrize("how", ["missing", "shorter", "no manifest"])
def test_a_damaged_checkpoint_is_skipped_and_stays(copied, caplog, how):
    newest = of_step(copied, 3)
    file = newest / ("manifest.json" if how == "no manifest" else "common.pt")
    if how == "shorter":
        os.truncate(file, 100)
    else:
        file.unlink()
    checkpoints = DistributedCheckpoints(copied)
    with caplog.at_level(logging.WARNING):
        latest = checkpoints.latest()
    assert latest is not None
    assert value_of(checkpoints, latest) == 2.0
    assert str(newest) in caplog.text
    assert "Going back to the one before" in caplog.text
    # It neither counts as one of the newest two nor is deleted.
    save(checkpoints, 4)
    assert {path.name for path in (newest, of_step(copied, 2), of_step(copied, 4))} == {
        path.name for path in copied.iterdir()
    }


def test_loading_what_was_damaged_since_offers_the_last_good_one(copied):
    checkpoints = DistributedCheckpoints(copied)
    newest = read_stored(of_step(copied, 3))
    next(newest.path.glob("__0_*")).write_bytes(b"")
    with pytest.raises(CheckpointDamaged, match=rf"has 0 bytes instead of.*checkpoint: .*{of_step(copied, 2).name}\."):
        checkpoints.load(newest, state(0.0), model=MODEL, precision="fp32")


def test_foreign_and_older_checkpoints_are_named(copied):
    from shared.training.manifest import write_manifest

    for step in (1, 2):
        shutil.rmtree(of_step(copied, step))
    megatron = of_step(copied, 3).rename(copied / "iter_0000003")
    with pytest.raises(ForeignCheckpoint, match=r"iter_0000003 is not a checkpoint of this program.*to start anew"):
        DistributedCheckpoints(copied).latest()
    # As an older program would have written it.
    from shared.training import manifest

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "VERSION", 0)
        megatron.rename(copied / write_manifest(megatron, 3, CONTENTS, None, {}))
    with pytest.raises(OtherCheckpointFormat, match="format version 0 and this program reads version 1"):
        DistributedCheckpoints(copied).latest()
    save(DistributedCheckpoints(copied), 4)
    latest = DistributedCheckpoints(copied).latest()
    assert latest is not None
    assert latest.step == 4


def test_another_architecture_or_tokenizer_is_refused_by_field(copied):
    checkpoints = DistributedCheckpoints(copied)
    latest = checkpoints.latest()
    assert latest is not None
    wider = dataclasses.replace(MODEL, hidden_size=32, qk_layernorm=True)
    with pytest.raises(CheckpointMismatch, match=r"model\.hidden_size is 16 there and 32 here; .*qk_layernorm is Fal"):
        checkpoints.load(latest, state(0.0), model=wider, precision="fp32")
    with pytest.raises(CheckpointMismatch, match=r"tokenizer is None there and .*'gpt2'.* here"):
        checkpoints.load(latest, state(0.0), model=MODEL, precision="fp32", tokenizer=Tokenizer("gpt2", "ab" * 32))
    with pytest.raises(CheckpointMismatch, match="precision is fp32 there and bf16 here"):
        checkpoints.load(latest, state(0.0), model=MODEL, precision="bf16")
    with pytest.raises(TypeError, match="'model' and 'precision'"):
        checkpoints.load(latest, state(0.0))  # pyright: ignore[reportCallIssue]
    other = {"other": state(0.0)["split"].__class__.from_rank_offsets("x", torch.ones(1))}
    with pytest.raises(CheckpointMismatch, match="does not hold what this model"):
        checkpoints.load(latest, other, model=MODEL, precision="fp32")


def test_a_field_that_came_later_had_its_default(copied):
    """As the manifest of a program that did not know `qkv_bias` and `moe` yet."""
    latest = DistributedCheckpoints(copied).latest()
    assert latest is not None
    contents = json.loads(json.dumps(latest.manifest["contents"]))
    del contents["model"]["moe"], contents["model"]["qkv_bias"]
    older = dataclasses.replace(latest, manifest={**latest.manifest, "contents": contents})
    assert value_of(DistributedCheckpoints(copied), older) == 3.0
    biased = dataclasses.replace(MODEL, qkv_bias=True)
    with pytest.raises(CheckpointMismatch, match="qkv_bias is None there and True here"):
        DistributedCheckpoints(copied).load(older, state(0.0), model=biased, precision="fp32")


def test_every_refused_write_is_named_and_loses_nothing(tmp_path, monkeypatch):
    checkpoints = DistributedCheckpoints(tmp_path)
    save(checkpoints, 1)
    fsync, calls = os.fsync, itertools.count()
    failing = 0

    def full(descriptor: int) -> None:
        if next(calls) == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    while True:
        calls = itertools.count()
        try:
            save(checkpoints, 2, asynchronous=failing % 2 == 0)
            checkpoints.wait()
            break
        except CheckpointNotWritten as error:
            said = str(error)
        assert "No space left on device" in said
        assert "earlier checkpoints are intact" in said
        failing += 1
        if steps(tmp_path) == [1, 2]:  # only the folder's own entry was not synced
            shutil.rmtree(of_step(tmp_path, 2))
        assert steps(tmp_path) == [1]
        assert not list(tmp_path.glob(".*"))
    assert failing >= 5
    assert value_of(checkpoints, checkpoints.latest()) == 2.0


def test_a_real_limit_of_the_file_system_is_named(tmp_path):
    initialize("cpu")
    checkpoints = DistributedCheckpoints(tmp_path)
    save(checkpoints, 1)
    large = state(2.0)
    large["split"] = type(large["split"]).from_rank_offsets("split", torch.ones(1 << 20))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(CheckpointNotWritten, match="File too large"):
            checkpoints.save(2, large, CONTENTS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert steps(tmp_path) == [1]
    assert not list(tmp_path.glob(".*"))


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointNotWritten, match=r"Cannot write a checkpoint to .*file"):
        save(DistributedCheckpoints(tmp_path / "file"), 1)


@pytest.mark.slow
def test_a_kill_at_any_moment_of_a_save_leaves_the_checkpoint_before(tmp_path):
    """The child kills itself at its k-th call that changes the disk, until k is beyond the last one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    for kill_at in itertools.count():
        folder = tmp_path / str(kill_at)
        save(DistributedCheckpoints(folder, keep=1), 1)
        child = context.Process(target=save_and_die, args=(folder, kill_at))
        child.start()
        child.join()
        fresh = DistributedCheckpoints(folder, keep=1)
        latest = fresh.latest()
        assert latest is not None
        assert value_of(fresh, latest) == latest.step
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        # The next save removes what the dead one left.
        save(fresh, 3)
        assert steps(folder) == [3]
        assert not list(folder.glob(".*"))
    assert kill_at >= 10
    assert latest.step == 2


def test_all_ranks_agree(tmp_path):
    first, second = run_ranks(on_two_ranks, Layout(dp=2), str(tmp_path))
    assert first == second
    assert "No space left on device" in first[0]
    assert first[1:] == [2, [2.0] * 6, 1, ["CheckpointDamaged"]]
    # Written by two, read by one.
    checkpoints = DistributedCheckpoints(tmp_path)
    latest = checkpoints.latest()
    assert latest is not None
    assert damaged_files(latest) == []
    assert value_of(checkpoints, latest) == 1.0
    assert issubclass(CheckpointDamaged, UnusableCheckpoint)
