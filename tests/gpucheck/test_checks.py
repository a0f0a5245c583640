"""Every check, CPU against CPU at a tiny size; what fails is told and the rest goes on; nothing is written."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shared.dryrun.count import count
from shared.dryrun.work import forward_flops
from shared.gpucheck import __main__ as command
from shared.gpucheck import processes, record, subjects
from shared.gpucheck.checks import CHECKS, Check, Machine, differences, run_checks
from shared.gpucheck.sizes import DRY, GPU
from shared.megatron.layout import Layout
from shared.megatron.model import build_model, forward_logits
from tests import ranks

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def one_fork_server():
    """What starts first in this process preloads for all tests of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "PRELOAD", [*ranks.PRELOAD, *processes.PRELOAD])
        yield


@pytest.fixture(scope="module")
def dry_run():
    lines: list[str] = []
    return run_checks("cpu", DRY, say=lines.append), lines


@pytest.mark.slow
def test_every_check_passes_against_itself(dry_run):
    result, lines = dry_run
    statuses = {check["name"]: check["status"] for check in result["checks"]}
    assert [*statuses] == [check.name for check in CHECKS]
    assert statuses.pop("transformer-engine") in ("skipped", "pass")
    assert set(statuses.values()) == {"pass"}, lines
    assert len(lines) == len(CHECKS)


@pytest.mark.slow
def test_the_record_is_what_can_be_committed(dry_run, tmp_path):
    result, _ = dry_run
    written = record.write(result, tmp_path)
    (loaded,) = record.load_all(tmp_path)
    assert loaded == json.loads(json.dumps(result, allow_nan=False))
    assert set(loaded) == {*record.FIELDS, "checks"}
    for check in loaded["checks"]:
        assert set(check) == {"name", "what", "status", "detail", "numbers", "limits", "wall_s"}
        assert all(isinstance(value, float | int | None) for value in check["numbers"].values())
    text = written.read_text()
    assert os.uname().nodename not in text
    assert str(ROOT) not in text


@pytest.mark.slow
def test_two_ranks_really_took_part(dry_run):
    """Sums over two ranks round differently: differences of exactly 0 in all of them would be one process twice."""
    result, _ = dry_run
    numbers = {check["name"]: check["numbers"] for check in result["checks"]}
    assert 0 < max(numbers["tp2"].values()) < 1e-5
    assert max(numbers["pretrain-bf16"].values()) > 0
    assert set(numbers["pretrain"].values()) == {0.0}


@pytest.mark.slow
def test_speed_is_measured(dry_run):
    result, _ = dry_run
    (numbers,) = [check["numbers"] for check in result["checks"] if check["name"] == "speed"]
    assert numbers["tokens_per_s"] == pytest.approx(DRY.base.rows * DRY.base.length / numbers["step_s"])
    flops = 3 * DRY.base.rows * forward_flops(DRY.base.model, count(DRY.base.model, Layout()), DRY.base.length)
    assert numbers["model_tflops"] * 1e12 * numbers["step_s"] == pytest.approx(flops)
    assert numbers["mfu"] is None
    assert numbers["peak_gib"] is None


def _raises(sizes, folder):
    (Path(folder) / "work").mkdir()
    (Path(folder) / "work").mkdir()


def _dies(sizes, folder):
    os.kill(os.getpid(), signal.SIGKILL)


def _fine(sizes, folder):
    return {"loss": [1.0, 2.0]}


def _off(sizes, folder):
    return {"loss": [1.0, 2.1]}


def _nan(sizes, folder):
    return {"loss": [math.nan, 2.0]}


def _sleeps(sizes, folder):
    time.sleep(60)


def test_failures_are_told_and_the_others_go_on(capsys):
    subjects_ = {"raises": _raises, "dies": _dies, "off": _off, "nan": _nan, "fine": _fine}
    checks = [Check(name, "", subject, _fine, {"loss": 1e-2}) for name, subject in subjects_.items()]
    lines: list[str] = []
    found = {check["name"]: check for check in run_checks("cpu", DRY, lines.append, checks)["checks"]}
    assert [check["status"] for check in found.values()] == ["fail"] * 4 + ["pass"]
    assert found["raises"]["detail"] == "FileExistsError: [Errno 17] File exists: 'work'"
    assert "Traceback" in capsys.readouterr().err
    assert found["dies"]["detail"] == "rank 0 died without an answer"
    assert found["off"]["detail"] == "loss 5.0e-02 > 0.01"
    assert found["nan"]["numbers"] == {"loss": None}
    assert lines[2].startswith("fail    off: loss 5.0e-02 > 0.01")


def test_a_check_that_hangs_is_ended():
    with pytest.raises(processes.RankFailed, match=r"no answer within 0\.2 s"):
        processes.on_ranks(_sleeps, "cpu", Layout(), DRY, timeout=0.2)


def test_a_series_that_ends_early_is_no_match():
    check = Check("x", "", _fine, _fine, {"loss": 1.0})
    assert differences(check, [{"loss": [1.0]}], {"loss": [1.0, 2.0]})["loss"] == math.inf


def test_what_a_machine_lacks_is_skipped():
    small = Machine("NVIDIA L4", 1, 22.0, "13.0", False)
    reasons = {check.name: check.skip(small, GPU) for check in CHECKS}
    assert {name for name, reason in reasons.items() if reason} == {"tp2", "dp2", "transformer-engine", "speed-large"}
    assert reasons["tp2"] == "needs 2 GPUs, this machine has 1"
    large = Machine("NVIDIA H100 80GB HBM3", 8, 79.1, "13.0", True)
    assert not any(check.skip(large, GPU) for check in CHECKS)


def test_the_command_says_that_there_is_no_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([]) == 2
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize(("status", "code"), [("pass", 0), ("fail", 1)])
def test_a_dry_run_writes_nothing(monkeypatch, status, code):
    monkeypatch.setattr("shared.gpucheck.checks.run_checks", lambda *_: {"checks": [{"status": status}]})
    monkeypatch.setattr(record, "write", lambda *_: pytest.fail("a dry run was written"))
    assert command.main(["--device", "cpu"]) == code


def test_no_rounding_decides_a_greedy_token():
    """The two largest logits are further apart than devices differ, at every step of the sizes for a GPU."""
    prompts, found = subjects.prompts(), subjects.greedy(GPU, "")
    new = GPU.new_tokens
    model = build_model(replace(GPU.model, init_std=0.1), subjects.GREEDY_SEED, device="cpu")
    for row, prompt in enumerate(prompts):
        tokens = [int(token) for token in found["tokens"][row * new : (row + 1) * new]]
        with torch.no_grad():
            logits = forward_logits(model, torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1]
        top = logits.topk(2).values
        assert logits.argmax(-1).tolist() == tokens
        assert (top[:, 0] - top[:, 1]).min() > 1e-3


def test_transformer_engines_names():
    """As Megatron's own map between both kinds of layer has them (gpt_layer_specs.py, sharded_state_dict_keys_map)."""
    name = subjects.engine_name
    assert name("decoder.layers.0.input_layernorm.weight") == (
        "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"
    )
    assert name("decoder.layers.1.pre_mlp_layernorm.weight") == "decoder.layers.1.mlp.linear_fc1.layer_norm_weight"
    assert name("decoder.layers.1.mlp.linear_fc1.weight") == "decoder.layers.1.mlp.linear_fc1.weight"
