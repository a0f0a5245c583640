"""One writer per folder: a second one is refused by name, and nobody who is dead is in the way."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from shared.experiment.files import FileLock, RunBusy
from shared.experiment.records import RunDirectory
from shared.training.sft import build_sft_policy
from tests.reliability.campaign import attempt
from tests.reliability.subjects import PRETRAIN, PROVENANCE, RL, SFT, run_pretraining


def open_run(path: Path, config: Any = RL) -> RunDirectory:
    return RunDirectory.open(path, config, 0, provenance=PROVENANCE)


def test_a_second_builder_of_the_same_policy_is_refused_by_name(tmp_path):
    with (
        open_run(tmp_path / "policy" / "run", SFT),
        pytest.raises(RunBusy, match=rf"policy/run is being run by process {os.getpid()} on .*: wait for it"),
    ):
        build_sft_policy(SFT, tmp_path / "policy")


def test_a_second_pretraining_in_the_same_folder_is_refused_by_name(tmp_path):
    with (
        open_run(tmp_path / "run", PRETRAIN),
        pytest.raises(RunBusy, match=rf"run is being run by process {os.getpid()} on "),
    ):
        run_pretraining(tmp_path)


def test_a_link_to_a_run_is_the_same_run(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with open_run(tmp_path / "run"), pytest.raises(RunBusy, match="link is being run by process"):
        open_run(tmp_path / "link")


def killed_while_a_child_writes(path: Path) -> None:
    run = open_run(path)
    lock = run._lock._descriptor
    child = os.fork()
    if child == 0:
        for descriptor in range(3, 256):
            if descriptor != lock:  # the parent of this test waits until the others are closed
                with suppress(OSError):
                    os.close(descriptor)
        time.sleep(60)
        os._exit(0)
    (path / "writer").write_text(str(child))
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_writer_that_outlives_its_killed_parent_does_not_block_the_next_start(tmp_path):
    code, _ = attempt(killed_while_a_child_writes, tmp_path / "run")
    assert code == -signal.SIGKILL
    try:
        open_run(tmp_path / "run").close()
    finally:
        os.kill(int((tmp_path / "run" / "writer").read_text()), signal.SIGKILL)


def test_a_forked_child_takes_nothing_from_its_parents_lock(tmp_path):
    lock = FileLock(tmp_path / "lock")
    assert lock.acquire()
    child = os.fork()
    if child == 0:
        os._exit(0 if lock._descriptor is None else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert not FileLock(tmp_path / "lock").acquire()
    lock.release()
    assert FileLock(tmp_path / "lock").acquire()
