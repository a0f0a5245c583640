"""What a power cut may leave: rows lost or torn, blocks of zeros, cut checkpoints, lost or empty small files."""

import json
import random
from pathlib import Path

import pytest

from shared.experiment.contracts import Interrupted
from shared.experiment.files import config_hash
from shared.experiment.records import RunDirectory, read_rows, status
from shared.rl.trainer import train_rl
from shared.training.checkpoint import Checkpoints, resume
from shared.training.sft import train_sft
from tests.reliability.subjects import PROVENANCE, RL, SFT, digest_of_latest, warm_start

KINDS = {"SFT": (SFT, lambda run: train_sft(run.config, run)), "RL": (RL, train_rl)}
ROUNDS = 5


def open_run(path: Path, config=SFT, **changes) -> RunDirectory:
    warm = {"warm": warm_start(path.parent / "warm")}
    return RunDirectory.open(path, config, 0, artifacts=warm, provenance=PROVENANCE | changes)


def train(path: Path, kind: str, stop_after: int = 10**9) -> tuple[bytes, str]:
    """Rows, and hash of the last state, after at most `stop_after` rows."""
    config, function = KINDS[kind]
    with open_run(path, config) as run:
        run.stop_requested = lambda: len(run.rows()) >= stop_after
        function(run)
        return (path / "metrics.jsonl").read_bytes(), digest_of_latest(run.checkpoints)


@pytest.fixture(scope="module", params=KINDS)
def whole(request, tmp_path_factory) -> tuple[str, tuple[bytes, str]]:
    return request.param, train(tmp_path_factory.mktemp(request.param) / "run", request.param)


def tear(path: Path, rng: random.Random) -> None:
    """Cut the end off, zero a block, or empty the file."""
    content = path.read_bytes()
    at = rng.randrange(len(content) + 1)
    zeros = content[:at] + bytes(min(64, len(content) - at)) + content[at + 64 :]
    path.write_bytes(rng.choice([content[:at], zeros, b""]))


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_a_run_ends_with_the_same_bits_whatever_a_power_cut_left(tmp_path, whole, seed):
    kind, result = whole
    rng, path = random.Random(seed), tmp_path / "run"
    with pytest.raises(Interrupted):
        train(path, kind, stop_after=5)
    torn = ["metrics.jsonl", "timing.jsonl", "cost.json"] + [f"checkpoints/{p.name}" for p in checkpoints(path)]
    for name in rng.sample(torn, rng.randrange(1, len(torn) + 1)):
        tear(path / name, rng)
    assert train(path, kind) == result


def checkpoints(path: Path) -> list[Path]:
    return sorted((path / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(("rows", "first"), [(7, 6), (5, 3), (2, 0)])
def test_lost_rows_send_a_run_back_to_a_checkpoint_whose_rows_are_there(tmp_path, caplog, rows, first):
    path = tmp_path / "run"
    for step in (3, 6, 8):
        with open_run(path) as run:
            for number in range(len(run.rows()), step):
                run.log(number, x=1.0)
            Checkpoints(run.checkpoints, keep=3).save(step, {"step": step})
    lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (path / "metrics.jsonl").write_text("".join(lines[:rows]))
    with open_run(path) as run:
        step, state = resume(run, Checkpoints(run.checkpoints))
        assert (step, (state or {"step": 0})["step"], len(run.rows())) == (first, first, first)
        # One that lies ahead must not push out what the run saves from now on.
        saved = Checkpoints(run.checkpoints, keep=1).save(step + 1, {"step": step + 1})
    assert saved.exists()
    assert f"Rows of checkpoint {path}/checkpoints/step-00000008" in caplog.text
    assert len(list((path / "checkpoints").glob("*.no-rows-1"))) == sum(step > rows for step in (3, 6, 8))


@pytest.mark.parametrize("name", ["metrics.jsonl", "timing.jsonl"])
@pytest.mark.parametrize("tail", [b'{"step": 2, "x', b'{"step": 2}\n\0\0\0\0{"step": 4}\n', b"\0" * 8, b"7\n"])
def test_what_follows_a_torn_row_is_dropped_and_the_file_stays_readable(tmp_path, name, tail):
    path = tmp_path / "run"
    with open_run(path) as run:
        for step in (0, 1):
            run.log(step, x=1.0)
            run.time(step, s=1.0)
    with open(path / name, "ab") as file:
        file.write(tail)
    with open_run(path) as run:
        run.rewind(1)
        run.log(2, x=1.0)
        run.time(2, s=1.0)
    assert [row["step"] for row in read_rows(path / name)][:2] == [0, 1]
    assert read_rows(path / name)[-1]["step"] == 2


@pytest.mark.parametrize("name", ["config.json", "provenance.json"])
def test_a_record_that_no_longer_says_what_it_is_of_is_not_gone_on_with(tmp_path, name):
    path = tmp_path / "run"
    with open_run(path) as run:
        run.log(0, x=1.0)
    (path / name).unlink()
    found = status(path, config_hash(SFT), "x")
    assert (found.kind, name in found.detail) == ("damaged", True)
    with open_run(path) as run:
        assert run.rows() == []
    assert (tmp_path / "run.damaged-1").exists()


def test_leftovers_of_killed_writers_go_at_the_next_start_and_count_as_nothing(tmp_path):
    path = tmp_path / "run"
    with open_run(path) as run:
        saved = Checkpoints(run.checkpoints).save(1, {"step": 1})
    leftovers = [path / ".summary.json.abc.tmp", saved.with_name(f".{saved.name}.abc.tmp")]
    for leftover in leftovers:
        leftover.write_bytes(saved.read_bytes())
    assert status(path, config_hash(SFT), "x").kind == "incomplete"
    with open_run(path) as run:
        assert not any(leftover.exists() for leftover in leftovers)
        assert Checkpoints(run.checkpoints).latest() == (1, {"step": 1})


def test_a_kill_right_after_the_summary_leaves_no_checkpoints_for_ever(tmp_path):
    path = tmp_path / "run"
    with open_run(path) as run:
        run.finish({})
    (path / "checkpoints").mkdir()
    with open_run(path) as run:
        assert run.completed == {}
    assert not (path / "checkpoints").exists()


def test_a_run_that_goes_on_elsewhere_says_so(tmp_path, caplog):
    path = tmp_path / "run"
    for packages in ("2.13", "2.14", "2.14"):
        open_run(path, packages={"torch": packages}, threads=1).close()
    provenance = json.loads((path / "provenance.json").read_text())
    assert provenance["packages"] == {"torch": "2.14"}
    assert provenance["earlier"] == [{"packages": {"torch": "2.13"}}]
    assert caplog.text.count("goes on with other packages") == 1
