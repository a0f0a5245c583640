"""Counting cores: hyper-threads once, quotas respected."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shared.experiment import cores


@pytest.fixture
def four_threads_on_two_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for cpu in range(4):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 2},{cpu % 2 + 2}\n")
    monkeypatch.setattr(cores, "CPUS", tmp_path)
    monkeypatch.setattr(cores, "CGROUP_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    return tmp_path


def test_siblings_count_once(four_threads_on_two_cores: Path) -> None:
    assert cores.available_cores() == 2


@pytest.mark.parametrize(("quota", "expected"), [("max 100000", 2), ("100000 100000", 1), ("20000 100000", 1)])
def test_quota(four_threads_on_two_cores: Path, quota: str, expected: int) -> None:
    (four_threads_on_two_cores / "cpu.max").write_text(quota + "\n")
    assert cores.available_cores() == expected


def test_the_affinity_mask_counts(four_threads_on_two_cores: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2}, raising=False)
    assert cores.available_cores() == 1
