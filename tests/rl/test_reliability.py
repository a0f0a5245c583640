"""An RL run that is asked to stop ends with the bytes of an undisturbed one; tests/reliability kills runs."""

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
