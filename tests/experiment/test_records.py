"""Records: written, resumed, recognised, and not believed when they were touched."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.experiment.contracts import AssayError, NonFinite
from shared.experiment.files import ConfigError, RunBusy, Unwritable, added, config_hash, plain
from shared.experiment.records import RunDirectory, set_reporter, status


@dataclass(frozen=True)
class Inner:
    beta: float = 0.5


@dataclass(frozen=True)
class Other:
    beta: float = 0.5


@dataclass(frozen=True)
class Config:
    steps: int = 4
    lr: float = 0.1
    inner: object = field(default_factory=Inner)


PROVENANCE = {"commit": "c0", "dirty": False, "code_hash": "code", "claims_hash": "claims", "artifacts": {}}


def open_run(path: Path, config: object = Config(), **changes: object) -> RunDirectory:
    return RunDirectory.open(path, config, seed=3, arm="a", study="s", provenance={**PROVENANCE, **changes})


def complete(path: Path, steps: int = 4) -> Path:
    with open_run(path) as run:
        for step in range(1, steps + 1):
            run.log(step, loss=1 / step)
        run.finish({"loss": 1 / steps, "undefined": None, "items": [0.0, 1.0]})
    return path


def kind(path: Path, config: object = Config(), code: str = "code") -> str:
    return status(path, config_hash(config), code).kind


def test_complete_record_tells_everything(tmp_path: Path) -> None:
    path = complete(tmp_path / "seed3")
    head = json.loads((path / "config.json").read_text())
    assert head["config"] == {
        "__type__": "Config",
        "steps": 4,
        "lr": 0.1,
        "inner": {"__type__": "Inner", "beta": 0.5},
    }
    assert (head["seed"], head["arm"], head["study"], head["scale"]) == (3, "a", "s", "proxy")
    lines = (path / "metrics.jsonl").read_text().splitlines()
    assert lines[2] == '{"step": 3, "loss": 0.3333333333333333}'
    summary = json.loads((path / "summary.json").read_text())
    assert summary["steps"] == 4
    assert summary["summary"]["undefined"] is None
    cost = json.loads((path / "cost.json").read_text())
    assert cost["attempts"] == 1
    assert cost["max_rss_mb"] > 1
    assert kind(path) == "complete"


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    first, second = complete(tmp_path / "one"), complete(tmp_path / "two")
    for name in ("metrics.jsonl", "config.json", "provenance.json", "summary.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_config_and_code_changes_make_a_record_stale(tmp_path: Path) -> None:
    path = complete(tmp_path / "seed3")
    assert kind(path, Config(lr=0.2)) == "stale"
    assert kind(path, code="other") == "stale"
    assert kind(tmp_path / "nothing") == "missing"
    with open_run(path, Config(lr=0.2)) as run:
        assert run.completed is None
        assert run.rows() == []
    assert (tmp_path / "seed3.stale-1" / "summary.json").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json", "provenance.json", "summary.json"])
@pytest.mark.parametrize("how", ["truncate", "edit", "delete"])
def test_a_touched_record_is_named_and_moved_aside(tmp_path: Path, name: str, how: str) -> None:
    path = complete(tmp_path / "seed3")
    content = (path / name).read_text()
    if how == "delete":
        (path / name).unlink()
    else:
        changed = content[: len(content) // 2] if how == "truncate" else content.replace("4", "5", 1)
        if changed == content:
            changed = content.replace("c0", "c1")
        (path / name).write_text(changed)
    found = status(path, config_hash(Config()), "code")
    if (name, how) == ("summary.json", "delete"):
        assert found.kind == "incomplete"  # what a kill just before the end leaves
        return
    if (name, how) == ("summary.json", "edit"):
        # "steps" is the only 4 here and says nothing that metrics.jsonl does not say
        (path / name).write_text(content.replace("0.25", "0.26"))
        found = status(path, config_hash(Config()), "code")
    assert found.kind == "damaged"
    assert name in found.detail
    with open_run(path) as run:
        assert run.rows() == []
    assert (tmp_path / "seed3.damaged-1").is_dir()


def test_resume_drops_what_lies_behind_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "seed3"
    with open_run(path) as run:
        for step in range(1, 8):
            run.log(step, x=step)
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "x"')  # killed while writing
    assert kind(path) == "incomplete"
    with open_run(path) as run:
        assert [row["step"] for row in run.rows()] == list(range(1, 8))
        run.rewind(5)
        assert run.rows()[-1] == {"step": 5, "x": 5}
        run.log(6, x=6)
        run.finish({})
    assert json.loads((path / "summary.json").read_text())["steps"] == 6
    assert json.loads((path / "cost.json").read_text())["attempts"] == 2


def test_a_restart_without_checkpoint_begins_again(tmp_path: Path) -> None:
    with open_run(tmp_path / "r") as run:
        run.log(1, x=1.0)
        run.log(2, x=2.0)
    with open_run(tmp_path / "r") as run:
        run.log(1, x=5.0)
        assert run.rows() == [{"step": 1, "x": 5.0}]
        with pytest.raises(AssayError, match="steps must grow"):
            run.log(1, x=5.0)


def test_a_resumed_record_is_as_dirty_as_its_dirtiest_part(tmp_path: Path) -> None:
    open_run(tmp_path / "r", dirty=True).close()
    with open_run(tmp_path / "r", commit="c1") as run:
        run.finish({})
    provenance = json.loads((tmp_path / "r" / "provenance.json").read_text())
    assert provenance["dirty"] is True
    assert provenance["commit"] == "c0"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_non_finite_values_stop_and_keep_what_was_there(tmp_path: Path, value: float) -> None:
    with open_run(tmp_path / "r") as run:
        run.log(1, loss=1.0)
        with pytest.raises(NonFinite, match="Step 2: loss is"):
            run.log(2, loss=value)
        assert len(run.rows()) == 1
        with pytest.raises(NonFinite, match=r"summary\['items'\]\[1\]"):
            run.finish({"items": [0.0, float(value)]})
    assert kind(tmp_path / "r") == "incomplete"


def test_second_process_is_refused_by_name(tmp_path: Path) -> None:
    with open_run(tmp_path / "r"), pytest.raises(RunBusy, match=rf"r is being run by process {os.getpid()}"):
        open_run(tmp_path / "r")
    open_run(tmp_path / "r").close()


def test_complete_record_cannot_be_written(tmp_path: Path) -> None:
    with open_run(complete(tmp_path / "r")) as run:
        assert run.completed is not None
        assert run.completed["loss"] == 0.25
        with pytest.raises(AssayError, match="is complete"):
            run.log(9, x=1.0)


def test_sigterm_asks_to_stop(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with open_run(tmp_path / "r") as run:
        assert not run.stop_requested()
        os.kill(os.getpid(), signal.SIGTERM)
        assert run.stop_requested()
    with open_run(tmp_path / "r") as run:
        assert not run.stop_requested()
    assert signal.getsignal(signal.SIGTERM) is before


def test_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Unwritable, match=r"file.*choose another folder"):
        open_run(tmp_path / "file" / "r")


def test_checkpoints_go_when_the_run_is_complete(tmp_path: Path) -> None:
    with open_run(tmp_path / "r") as run:
        (run.checkpoints / "x").write_text("state")
    assert (tmp_path / "r" / "checkpoints" / "x").exists()
    with open_run(tmp_path / "r") as run:
        assert (run.checkpoints / "x").exists()
        run.finish({})
    assert not (tmp_path / "r" / "checkpoints").exists()


def test_undeclared_artifact(tmp_path: Path) -> None:
    with open_run(tmp_path / "r") as run, pytest.raises(AssayError, match=r"declares no artifact 'policy'"):
        run.artifact("policy")


def test_progress_reaches_the_reporter(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    set_reporter(lambda done, total: seen.append((done, total)))
    try:
        with open_run(tmp_path / "r") as run:
            for step in range(1, 101):
                run.progress(step, 100)
    finally:
        set_reporter(None)
    assert seen[-1] == (100, 100)
    assert len(seen) < 50


def test_plain_tells_kinds_apart_and_refuses_functions() -> None:
    assert config_hash(Config(inner=Inner())) != config_hash(Config(inner=Other()))
    assert plain({"a": (1, np.float32(0.5), math.inf)}) == {"a": [1, 0.5, "inf"]}
    with pytest.raises(ConfigError, match=r"config\.inner is a function"):
        config_hash(Config(inner=lambda: 1))


@given(st.dictionaries(st.text(min_size=1), st.floats(allow_nan=False, allow_infinity=False)))
def test_plain_survives_json(values: dict[str, float]) -> None:
    assert json.loads(json.dumps(plain(values))) == values


def test_a_field_added_later_leaves_the_hash_of_older_records_alone():
    @dataclass(frozen=True)
    class Before:
        steps: int = 3

    @dataclass(frozen=True)
    class After:
        steps: int = 3
        bias: bool = added(False)

    After.__name__ = "Before"
    assert config_hash(After()) == config_hash(Before())
    assert config_hash(After(bias=True)) != config_hash(Before())
    assert plain([After()])[0]["bias"] is False
