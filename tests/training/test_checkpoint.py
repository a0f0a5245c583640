"""Checkpoints under the accidents they exist for: truncation, edits, unwritable folders, full disks, kills."""

import errno
import logging
import os

import pytest
import torch

from shared.training.checkpoint import (
    CheckpointNotWritten,
    Checkpoints,
    WeightsDamaged,
    load_weights,
    save_weights,
)


def state(step: int) -> dict:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict(), "step": step, "note": ["a", 1.5]}


def assert_equal(a, b) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    else:
        assert a == b


def test_round_trip_and_retention(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    assert checkpoints.latest() is None
    assert checkpoints.describe_latest() == "none"
    states = {step: state(step) for step in (9, 10, 100)}
    for step, value in states.items():
        path = checkpoints.save(step, value)
    step, loaded = Checkpoints(tmp_path / "c").latest()
    assert step == 100
    assert_equal(loaded, states[100])
    assert_equal(torch.load(path, weights_only=True), states[100])
    assert sorted(p.name[:13] for p in (tmp_path / "c").iterdir()) == ["step-00000010", "step-00000100"]
    assert checkpoints.describe_latest() == str(path)


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_damaged_checkpoint_is_named_and_the_previous_one_used(tmp_path, caplog, damage):
    checkpoints = Checkpoints(tmp_path)
    first = state(1)
    kept = checkpoints.save(1, first)
    path = checkpoints.save(2, state(2))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes({"truncate": data[: len(data) // 2], "flip": data, "empty": b""}[damage])
    fresh = Checkpoints(tmp_path)
    with caplog.at_level(logging.WARNING):
        step, loaded = fresh.latest()
    assert step == 1
    assert_equal(loaded, first)
    assert fresh.damaged == [path]
    assert str(path) in caplog.text
    assert fresh.describe_latest() == str(kept)
    # The good file must not be pushed out by the damaged one, which stays as evidence.
    fresh.save(2, state(2))
    assert kept.exists()
    assert path.exists()
    assert fresh.latest()[0] == 2


def test_all_damaged_means_start_over(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, state(step)).write_bytes(b"")
    assert checkpoints.latest() is None
    assert len(checkpoints.damaged) == 2


def test_full_disk_is_named_and_loses_nothing(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1))

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointNotWritten, match=r"No space left.*saved before is intact"):
        checkpoints.save(2, state(2))
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 1
    assert checkpoints.latest()[0] == 1


def test_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointNotWritten, match=r"Cannot write .*file"):
        Checkpoints(tmp_path / "file").save(1, state(1))


def test_a_killed_writer_leaves_only_an_ignored_temporary_file(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(1, state(1))
    (tmp_path / f".{path.name}.abc.tmp").write_bytes(path.read_bytes()[:100])
    (tmp_path / "step-00000007.pt").write_bytes(b"not ours")
    assert Checkpoints(tmp_path).latest()[0] == 1


def test_weights_round_trip_and_damage(tmp_path):
    path = tmp_path / "w.safetensors"
    weights = {"a": torch.randn(3, 4), "b.c": torch.arange(5), "empty_extra_state": None, "h": torch.ones(2).bfloat16()}
    save_weights(path, weights)
    assert_equal(load_weights(path), {k: v for k, v in weights.items() if v is not None})
    again = tmp_path / "again.safetensors"
    save_weights(again, weights)
    assert path.read_bytes() == again.read_bytes()
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsDamaged, match="does not match its checksum"):
        load_weights(path)
    path.write_bytes(data[:-8])
    with pytest.raises(WeightsDamaged, match="cannot be read"):
        load_weights(path)
    with pytest.raises(WeightsDamaged, match="cannot be read"):
        load_weights(tmp_path / "missing.safetensors")
