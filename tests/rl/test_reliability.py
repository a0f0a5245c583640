"""An RL run that is killed, asked to stop, or finds a damaged checkpoint ends with the bytes of an undisturbed one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shared.experiment.contracts import Interrupted
from shared.experiment.records import RunDirectory
from shared.rl.trainer import train_rl
from tests.rl.test_learner import FirstTokenEven, Run, config

ROOT = Path(__file__).parents[2]
CONFIG = config(task=FirstTokenEven(), rollouts=6)

# Every row of the child is followed by a signal to itself, once the row of that number is written.
CHILD = """
import os, signal, sys
from shared.experiment.contracts import Interrupted
from tests.rl import test_reliability as t
class Struck(t.Disturbed):
    def log(self, step, **metrics):
        super().log(step, **metrics)
        if step == int(sys.argv[3]): os.kill(os.getpid(), int(sys.argv[2]))
try:
    t.train(t.Path(sys.argv[1]), Struck)
except Interrupted as stopped:
    print(stopped); sys.exit(7)
"""


class Disturbed(Run):
    """Stops for real signals alone."""

    stop_requested = RunDirectory.stop_requested


def train(path: Path, kind=Disturbed) -> bytes:
    with kind.open(path, CONFIG, 0) as run:
        train_rl(run)
    return (path / "metrics.jsonl").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> bytes:
    return train(tmp_path_factory.mktemp("whole") / "run")


def strike(path: Path, number: signal.Signals, step: int) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", CHILD, str(path), str(int(number)), str(step)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ}, capture_output=True, text=True)


class Watched(Disturbed):
    """Remembers which rollout it went on with."""

    first = None

    def log(self, step, **metrics):
        super().log(step, **metrics)
        Watched.first = step if Watched.first is None else Watched.first


@pytest.mark.slow
@pytest.mark.parametrize(("truncate", "resumes_at"), [(False, 4), (True, 2)])
def test_sigkill_then_resume_is_identical(tmp_path, undisturbed, caplog, truncate, resumes_at):
    """Checkpoints stand after rollouts 2 and 4; a truncated newest one is named and the previous one used."""
    done = strike(tmp_path / "run", signal.SIGKILL, 4)
    assert done.returncode == -signal.SIGKILL
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    assert newest.name.startswith("step-00000004")
    if truncate:
        newest.write_bytes(newest.read_bytes()[:-50])
    Watched.first = None
    assert train(tmp_path / "run", Watched) == undisturbed
    assert Watched.first == resumes_at
    assert (newest.name in caplog.text) == truncate


def test_a_checkpoint_without_its_rows_is_not_trusted(tmp_path, undisturbed):
    path = tmp_path / "run"
    with Disturbed.open(path, CONFIG, 0) as run:
        run.stop_requested = lambda: len(run.rows()) >= 3
        with pytest.raises(Interrupted):
            train_rl(run)
        run.rewind(0)
    assert train(path) == undisturbed


@pytest.mark.slow
def test_sigterm_saves_the_last_rollout_and_resumes(tmp_path, undisturbed):
    done = strike(tmp_path / "run", signal.SIGTERM, 2)
    assert done.returncode == 7, done.stderr
    assert "after rollout 2, checkpoint saved" in done.stdout
    assert any(path.name.startswith("step-00000003") for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert train(tmp_path / "run") == undisturbed
