"""An RL run that is killed, asked to stop, or finds a damaged checkpoint ends with the bytes of an undisturbed one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shared.experiment.records import RunDirectory
from shared.rl.trainer import train_rl
from tests.rl.test_learner import FirstTokenEven, Run, config

ROOT = Path(__file__).parents[2]
CONFIG = config(task=FirstTokenEven(), rollouts=5)

# Every row of the child is followed by a signal to itself, once the row of that number is written.
CHILD = """
import os, signal, sys
from shared.experiment.contracts import Interrupted
from tests.rl import test_reliability as t
class Struck(t.Disturbed):
    def log(self, step, **metrics):
        super().log(step, **metrics)
        if step == 2: os.kill(os.getpid(), int(sys.argv[2]))
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


def strike(path: Path, number: signal.Signals) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", CHILD, str(path), str(int(number))]
    return subprocess.run(command, cwd=ROOT, env={**os.environ}, capture_output=True, text=True)


@pytest.mark.slow
def test_sigkill_then_resume_is_identical_even_with_a_truncated_checkpoint(tmp_path, undisturbed, caplog):
    done = strike(tmp_path / "run", signal.SIGKILL)
    assert done.returncode == -signal.SIGKILL
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[:-50])
    assert train(tmp_path / "run") == undisturbed
    assert newest.name in caplog.text


@pytest.mark.slow
def test_sigterm_saves_the_last_rollout_and_resumes(tmp_path, undisturbed):
    done = strike(tmp_path / "run", signal.SIGTERM)
    assert done.returncode == 7, done.stderr
    assert "after rollout 2, checkpoint saved" in done.stdout
    assert any(path.name.startswith("step-00000003") for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert train(tmp_path / "run") == undisturbed
