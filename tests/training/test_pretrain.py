"""The pretraining loop: it learns, stops and goes on without a trace, under one layout and across layouts."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.data.markov import MarkovText
from shared.experiment.contracts import Interrupted, NonFinite
from shared.experiment.records import RunDirectory
from shared.megatron.config import ModelConfig
from shared.megatron.hf import export_hf, import_hf
from shared.megatron.hf_config import UnsupportedArchitecture
from shared.megatron.layout import ImpossibleLayout, Layout
from shared.training.distributed_checkpoint import DistributedCheckpoints
from shared.training.manifest import CheckpointMismatch
from shared.training.pretrain import BadPretrainConfig, PretrainConfig, check, learning_rate, pretrain
from tests.ranks import run_ranks
from tests.training.recorder import Recorder

MODEL = ModelConfig(
    num_layers=2, hidden_size=32, num_attention_heads=2, num_query_groups=2, head_dim=16, ffn_hidden_size=64,
    vocab_size=32, max_sequence_length=16,
)  # fmt: skip
CONFIG = PretrainConfig(
    MODEL, sequence_length=16, global_batch_size=8, micro_batch_size=2, steps=8, lr=1e-2, warmup_steps=2,
    checkpoint_every=2, eval_every=2,
)  # fmt: skip
TEXT = MarkovText(vocab_size=32)


def train(rank: int, config: PretrainConfig, folder: str, stop_at: int | None = None, stop_rank: int = 0):
    """The summary, or what the run said when it was stopped."""
    try:
        return pretrain(config, Recorder(folder, stop_at, stop_rank), TEXT)
    except Interrupted as error:
        return str(error)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    summary = train(0, CONFIG, str(folder))
    return Recorder(folder).rows(), summary


def assert_close(rows, others):
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for name in row:
            assert row[name] == pytest.approx(other[name], rel=1e-6, abs=1e-6), (row["step"], name)


def test_it_learns_the_language_and_logs_every_step(uninterrupted):
    rows, summary = uninterrupted
    assert [row["step"] for row in rows] == list(range(8))
    assert rows[0]["loss"] == pytest.approx(math.log(32), abs=0.1)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert summary["eval_loss"] == rows[7]["eval_loss"] > TEXT.entropy_rate
    assert [row["step"] for row in rows if "eval_loss" in row] == [1, 3, 5, 7]
    assert summary["tokens"] == 8 * 8 * 16


def test_a_stopped_run_goes_on_bit_for_bit(uninterrupted, tmp_path):
    for stop_at in (3, 4, 7):
        said = train(0, CONFIG, str(tmp_path), stop_at)
        assert said == f"Stopped after step {stop_at - 1} of 8, checkpoint saved: start again to go on."
    summary = train(0, CONFIG, str(tmp_path))
    assert (Recorder(tmp_path).rows(), summary) == uninterrupted
    # Nothing is left to do: the summary comes from the last checkpoint.
    assert train(0, CONFIG, str(tmp_path)) == summary


def weights_of(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def test_a_finished_run_keeps_the_weights_that_it_trained(tmp_path, monkeypatch):
    trained: dict[str, torch.Tensor] = {}

    def export(chunks: Any, path: Path) -> None:
        trained.update({name: weight.detach().clone() for name, weight in chunks[0].named_parameters()})
        export_hf(chunks, path)

    monkeypatch.setattr("shared.training.pretrain.export_hf", export)
    with RunDirectory.open(tmp_path / "run", CONFIG, 0, provenance={"code_hash": "x"}) as run:
        run.finish(pretrain(CONFIG, run, TEXT))
    assert not (tmp_path / "run" / "checkpoints").exists()
    found = dict(import_hf(tmp_path / "run" / "model").named_parameters())
    assert found.keys() == trained.keys()
    assert all(torch.equal(found[name], trained[name]) for name in trained)


def test_a_run_that_was_killed_before_it_finished_exports_again(tmp_path):
    train(0, CONFIG, str(tmp_path))
    whole = weights_of(tmp_path)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"of an earlier attempt")
    (tmp_path / ".model.old").mkdir()
    (tmp_path / ".model.old" / "left").touch()
    train(0, CONFIG, str(tmp_path))
    assert weights_of(tmp_path) == whole
    assert not list(tmp_path.glob(".model*"))


def test_ranks_export_the_whole_model(tmp_path):
    layout = Layout(tp=2, sequence_parallel=True)
    run_ranks(train, layout, dataclasses.replace(CONFIG, steps=4), str(tmp_path))
    whole = dict(import_hf(tmp_path / "model").named_parameters())
    train(0, dataclasses.replace(CONFIG, steps=4), str(tmp_path))  # loads the last checkpoint, trains nothing
    for name, weight in import_hf(tmp_path / "model").named_parameters():
        assert torch.equal(weight, whole[name]), name


def test_a_model_that_cannot_be_exported_is_refused_before_it_trains(tmp_path):
    unknown = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, qkv_bias=True, qk_layernorm=True))
    with pytest.raises(UnsupportedArchitecture, match="no Hugging Face architecture has"):
        pretrain(unknown, Recorder(tmp_path), TEXT)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "layout",
    [Layout(dp=2), Layout(tp=2, sequence_parallel=True), Layout(pp=2)],
    ids=str,
)
def test_another_layout_goes_on_with_the_same_losses(uninterrupted, tmp_path, layout):
    """The stop reaches one rank only, the second one, between two regular checkpoints."""
    for said in run_ranks(train, layout, CONFIG, str(tmp_path), 5, 1):
        assert said.startswith("Stopped after step 4")
    summary: Any = train(0, CONFIG, str(tmp_path))
    assert_close(Recorder(tmp_path).rows(), uninterrupted[0])
    assert summary["eval_loss"] == pytest.approx(uninterrupted[1]["eval_loss"], abs=1e-6)


def test_every_layout_is_given_the_same_global_batch():
    whole = TEXT.training(3, 5, range(8), 17)
    assert torch.equal(whole[4:], TEXT.training(3, 5, range(4, 8), 17))
    assert torch.equal(whole[:, :9], TEXT.training(3, 5, range(8), 17)[:, :9])
    assert not torch.equal(whole, TEXT.training(3, 6, range(8), 17))
    assert not torch.equal(whole, TEXT.training(4, 5, range(8), 17))
    assert not torch.equal(whole[:2], TEXT.held_out(range(2), 17))


def test_the_entropy_rate_is_that_of_the_sequences():
    tokens = TEXT.held_out(range(400), 65)
    counts = torch.zeros(32, 32)
    counts.index_put_((tokens[:, :-1].flatten(), tokens[:, 1:].flatten()), torch.ones(400 * 64), accumulate=True)
    conditional = counts / counts.sum(1, keepdim=True)
    seen = counts > 0
    entropy = -(counts[seen] / counts.sum() * conditional[seen].log()).sum()
    assert seen.sum() <= 32 * 4
    assert float(entropy) == pytest.approx(TEXT.entropy_rate, abs=0.02)


def test_rows_lost_in_a_power_cut_are_trained_again(uninterrupted, tmp_path, caplog):
    train(0, CONFIG, str(tmp_path), 6)
    run = Recorder(tmp_path)
    run.rewind(4)
    train(0, CONFIG, str(tmp_path))
    assert "Rows of checkpoint" in caplog.text
    assert run.rows() == uninterrupted[0]
    set_aside = [path.name for path in run.checkpoints.iterdir() if path.name.endswith(".no-rows-1")]
    assert [name[:13] for name in set_aside] == ["step-00000006"]


def test_a_loss_that_is_not_finite_names_step_and_last_good_checkpoint(tmp_path, monkeypatch):
    from shared.megatron.parallel import ParallelModel, StepResult

    honest = ParallelModel.train_step
    steps = []

    def dishonest(self, microbatches, lr):
        steps.append(lr)
        return StepResult(math.nan, 1.0, 0) if len(steps) == 4 else honest(self, microbatches, lr)

    monkeypatch.setattr(ParallelModel, "train_step", dishonest)
    with pytest.raises(NonFinite, match=r"Step 3: loss is nan on sequences 0 to 7 .*step-00000002-[0-9a-f]{16}\."):
        pretrain(CONFIG, Recorder(tmp_path), TEXT)
    assert len(Recorder(tmp_path).rows()) == 3


def test_another_seed_or_language_does_not_go_on_with_a_checkpoint(tmp_path):
    train(0, CONFIG, str(tmp_path), 2)
    with pytest.raises(CheckpointMismatch, match=r"data\.batches\.language is 0 there and 1 here"):
        pretrain(CONFIG, Recorder(tmp_path), MarkovText(32, language=1))
    with pytest.raises(CheckpointMismatch, match="seed is 0 there and 1 here"):
        pretrain(dataclasses.replace(CONFIG, seed=1), Recorder(tmp_path), TEXT)


def test_another_batch_size_or_length_does_not_go_on_with_a_checkpoint(tmp_path):
    train(0, CONFIG, str(tmp_path), 3)
    found = DistributedCheckpoints(tmp_path / "checkpoints").latest()
    assert found is not None
    assert (found.step, found.manifest["contents"]["consumed_samples"]) == (3, 3 * CONFIG.global_batch_size)
    with pytest.raises(CheckpointMismatch, match=r"data\.global_batch_size is 8 there and 4 here"):
        pretrain(dataclasses.replace(CONFIG, global_batch_size=4), Recorder(tmp_path), TEXT)
    with pytest.raises(CheckpointMismatch, match=r"data\.sequence_length is 16 there and 12 here"):
        pretrain(dataclasses.replace(CONFIG, sequence_length=12), Recorder(tmp_path), TEXT)


def test_schedules():
    cosine = [learning_rate(CONFIG, step) / CONFIG.lr for step in range(8)]
    assert cosine[:3] == [0.5, 1.0, 1.0]
    assert cosine[7] == pytest.approx(0.1)
    wsd = dataclasses.replace(CONFIG, schedule="wsd", decay_steps=3, min_lr_fraction=0.0)
    assert [learning_rate(wsd, step) / wsd.lr for step in range(8)] == pytest.approx([0.5, 1, 1, 1, 1, 2 / 3, 1 / 3, 0])


def test_what_does_not_fit_is_refused_before_anything_is_built():
    with pytest.raises(ImpossibleLayout, match=r"global_batch_size=8 is not a multiple of .* = 16"):
        check(CONFIG, Layout(dp=8))
    with pytest.raises(ImpossibleLayout, match="num_layers=2"):
        check(CONFIG, Layout(pp=4))
    with pytest.raises(BadPretrainConfig, match="sequence_length=17"):
        dataclasses.replace(CONFIG, sequence_length=17)
    with pytest.raises(BadPretrainConfig, match="decay_steps > 0"):
        dataclasses.replace(CONFIG, schedule="wsd")
    with pytest.raises(BadPretrainConfig, match="= 10 are more than steps=8"):
        dataclasses.replace(CONFIG, schedule="wsd", decay_steps=8)
    with pytest.raises(BadPretrainConfig, match="leave decay_steps at 0"):
        dataclasses.replace(CONFIG, decay_steps=3)


@pytest.mark.parametrize(
    ("name", "least"),
    [("sequence_length", 1), ("global_batch_size", 1), ("micro_batch_size", 1), ("steps", 1), ("checkpoint_every", 1),
     ("eval_batches", 1), ("eval_every", 0), ("warmup_steps", 0), ("decay_steps", 0)],
)  # fmt: skip
def test_a_number_that_is_too_small_is_refused_by_name(name, least):
    with pytest.raises(BadPretrainConfig, match=f"{name}={least - 1} is too small: at least {least}"):
        dataclasses.replace(CONFIG, **{name: least - 1})


def test_every_checkpoint_that_is_due_has_the_loss_by_which_the_best_is_kept(tmp_path):
    with pytest.raises(BadPretrainConfig, match="checkpoint_every=2 is not a multiple of eval_every=4"):
        dataclasses.replace(CONFIG, eval_every=4)
    # A rate this high makes the loss rise: the best is neither of the newest two.
    train(0, dataclasses.replace(CONFIG, lr=1.0, warmup_steps=6), str(tmp_path))
    losses = {row["step"] + 1: row["eval_loss"] for row in Recorder(tmp_path).rows() if "eval_loss" in row}
    best = DistributedCheckpoints(tmp_path / "checkpoints").best()
    assert best is not None
    assert (best.metric, best.step) == min((loss, step) for step, loss in losses.items())
    assert best.step < 6
