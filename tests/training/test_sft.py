"""The warm start: loss, determinism, and that every way of stopping and resuming gives the same bits."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shared.data.tasks import get_task
from shared.experiment.contracts import Interrupted, NonFinite
from shared.experiment.records import RunDirectory
from shared.megatron.model import ModelConfig, build_model, forward_logits, parameter_count
from shared.training.checkpoint import load_weights
from shared.training.sft import (
    ConfigMismatch,
    SFTConfig,
    batch_rows,
    build_sft_policy,
    derivation_pool,
    response_nll,
    train_sft,
)

TASK = get_task("plain_countdown")
MODEL = ModelConfig(1, 16, 2, 1, 8, 24, TASK.vocab_size, 32, qk_layernorm=True)
CONFIG = SFTConfig(
    MODEL, TASK, steps=12, pool=80, batch_size=8, warmup_steps=3, eval_problems=4, eval_samples=2, checkpoint_every=5
)
PROVENANCE = {"commit": "c", "claims_hash": "h", "code_hash": "x", "dirty": False}


class Run(RunDirectory):
    """A run that is asked to stop, or breaks, right after logging a step."""

    stop_after = crash_after = None
    last = -1

    def log(self, step, **metrics):
        super().log(step, **metrics)
        self.last = step
        if step == self.crash_after:
            raise RuntimeError("crash")

    def stop_requested(self):
        return self.last == self.stop_after


def attempt(folder: Path, **events):
    """Train in `folder` (going on where it stands); bytes of metrics.jsonl and the final weights."""
    with Run.open(folder, CONFIG, seed=0, provenance=PROVENANCE) as run:
        for name, step in events.items():
            setattr(run, name, step)
        model = train_sft(CONFIG, run)
        return (folder / "metrics.jsonl").read_bytes(), model.state_dict()


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return attempt(tmp_path_factory.mktemp("reference") / "run")


def assert_same(result, reference):
    assert result[0] == reference[0]
    assert result[1].keys() == reference[1].keys()
    for name, tensor in reference[1].items():
        assert tensor is None or torch.equal(result[1][name], tensor), name


def test_same_seed_twice_is_identical_and_learns(tmp_path, reference):
    assert_same(attempt(tmp_path / "run"), reference)
    rows = [json.loads(line) for line in reference[0].splitlines()]
    assert [row["step"] for row in rows] == list(range(12))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.08
    assert rows[2]["lr"] == pytest.approx(3e-3)
    assert rows[-1]["lr"] == pytest.approx(3e-4)


def test_stop_saves_a_checkpoint_and_resumes_identically(tmp_path, reference):
    with pytest.raises(Interrupted, match="after step 6"):
        attempt(tmp_path / "run", stop_after=6)
    assert [p.name[:13] for p in sorted((tmp_path / "run/checkpoints").iterdir())] == ["step-00000005", "step-00000007"]
    assert_same(attempt(tmp_path / "run"), reference)


def test_stop_at_the_last_step_is_a_finished_run(tmp_path, reference):
    assert_same(attempt(tmp_path / "run", stop_after=11), reference)


def test_crash_between_checkpoints_resumes_identically(tmp_path, reference):
    for step in (3, 8):
        with pytest.raises(RuntimeError, match="crash"):
            attempt(tmp_path / "run", crash_after=step)
    assert_same(attempt(tmp_path / "run"), reference)


def test_truncated_checkpoint_is_named_and_the_previous_one_used(tmp_path, reference, caplog):
    with pytest.raises(RuntimeError, match="crash"):
        attempt(tmp_path / "run", crash_after=11)
    newest = sorted((tmp_path / "run/checkpoints").iterdir())[-1]
    assert newest.name.startswith("step-00000010")
    newest.write_bytes(newest.read_bytes()[:-100])
    assert_same(attempt(tmp_path / "run"), reference)
    assert str(newest) in caplog.text


def test_explosion_names_step_rows_and_last_good_checkpoint(tmp_path):
    config = replace(CONFIG, lr=1e38, warmup_steps=0)
    with Run.open(tmp_path / "run", config, seed=0, provenance=PROVENANCE) as run:
        with pytest.raises(NonFinite, match="Step 1: loss is nan on pool rows") as error:
            train_sft(config, run)
        assert str(batch_rows(config, 1).tolist()) in str(error.value)
        assert "last good checkpoint: none" in str(error.value)
        assert [row["step"] for row in run.rows()] == [0]


@pytest.mark.parametrize("field", [{"vocab_size": 20}, {"max_sequence_length": 27}])
def test_model_that_cannot_hold_the_task_is_refused(field):
    with pytest.raises(ConfigMismatch, match=r"vocab_size=21 and max_sequence_length>=28"):
        replace(CONFIG, model=replace(MODEL, **field))


def test_loss_is_the_exact_mean_over_response_tokens():
    model = build_model(MODEL, seed=1)
    tokens_BL, response_BL = (t[:6] for t in derivation_pool(CONFIG))
    total, count = 0.0, 0
    for tokens, response in zip(tokens_BL, response_BL, strict=True):
        prompt_length, length = int(response.int().argmax()), int(response.nonzero().max()) + 1
        assert tokens[length - 1] == TASK.eos_id
        assert (tokens[length:] == TASK.pad_id).all()
        assert TASK.render([tokens[prompt_length - 1].item()]) == ":"
        logp_TV = forward_logits(model, tokens[None, :length])[0].double().log_softmax(-1)
        for t in range(prompt_length, length):
            total -= logp_TV[t - 1, tokens[t]].item()
            count += 1
    assert response_nll(model, tokens_BL, response_BL).item() == pytest.approx(total / count, abs=1e-6)


def test_batches_depend_on_seed_and_step_alone():
    assert torch.equal(batch_rows(CONFIG, 3), batch_rows(replace(CONFIG, steps=99, lr=1.0), 3))
    assert not torch.equal(batch_rows(CONFIG, 3), batch_rows(CONFIG, 4))
    assert not torch.equal(batch_rows(CONFIG, 3), batch_rows(replace(CONFIG, seed=1), 3))
    seen = torch.cat([batch_rows(CONFIG, step) for step in range(100)]).bincount(minlength=CONFIG.pool)
    assert len(seen) == CONFIG.pool
    assert (seen > 0).all()


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A policy folder whose build was interrupted once."""
    folder = tmp_path_factory.mktemp("policy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shared.training.sft.RunDirectory", Run)
        patch.setattr(Run, "stop_after", 4)
        with pytest.raises(Interrupted):
            build_sft_policy(CONFIG, folder)
    build_sft_policy(CONFIG, folder)
    return folder


def test_policy_folder_is_resumable_and_loads(policy, reference):
    assert (policy / "run/metrics.jsonl").read_bytes() == reference[0]
    weights = load_weights(policy / "weights.safetensors")
    for name, tensor in weights.items():
        assert torch.equal(tensor, reference[1][name])
    model = build_model(MODEL, seed=9)
    model.load_state_dict(weights)
    tokens_BT = torch.tensor([[1, 5, 6, 7]])
    expected = build_model(MODEL, seed=8)
    expected.load_state_dict(reference[1])
    assert torch.equal(forward_logits(model, tokens_BT), forward_logits(expected, tokens_BT))


def test_policy_evaluation_is_complete(policy):
    result = json.loads((policy / "eval.json").read_text())
    assert set(result) == {"pass@1", "pass@2", "entropy", "length_mean", "truncated", "parameters"}
    assert result["parameters"] == parameter_count(build_model(MODEL, seed=0))
    assert json.loads((policy / "config.json").read_text())["task"]["name"] == "plain_countdown"


def test_finished_policy_is_not_built_again(policy):
    before = (policy / "weights.safetensors").stat().st_mtime_ns
    build_sft_policy(CONFIG, policy)
    assert (policy / "weights.safetensors").stat().st_mtime_ns == before


@pytest.mark.slow
def test_sigkill_in_mid_training_resumes_identically(tmp_path, reference):
    code = (
        "import os, signal, sys\n"
        "from tests.training import test_sft\n"
        "class Killed(test_sft.Run):\n"
        "    def log(self, step, **metrics):\n"
        "        super().log(step, **metrics)\n"
        "        if step == 8: os.kill(os.getpid(), signal.SIGKILL)\n"
        "test_sft.Run = Killed\n"
        "test_sft.attempt(test_sft.Path(sys.argv[1]))\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], cwd=root, env={**os.environ})
    assert done.returncode == -signal.SIGKILL
    assert len((tmp_path / "run/metrics.jsonl").read_bytes().splitlines()) == 9
    assert_same(attempt(tmp_path / "run"), reference)
