"""Hugging Face folders under every kind of layout: the loss of what was read, and the bytes of what is written."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from shared.megatron.hf import ExportNotWritten, export_hf, hf_model_config, import_hf, load_hf, to_hf_state_dict
from shared.megatron.layout import ImpossibleLayout, Layout
from shared.megatron.optimizer import AdamWConfig
from shared.megatron.parallel import Microbatch, ParallelModel
from tests.megatron.hf_models import build, same, save, tensors
from tests.ranks import run_ranks

LAYOUTS = {
    "qwen3": Layout(tp=2),
    "llama": Layout(pp=2),
    "llama-interleaved": Layout(pp=2, virtual_pp=2),
    "qwen2": Layout(tp=2, pp=2),
    "qwen3_moe": Layout(dp=2, ep=2),
    "mixtral": Layout(tp=2, ep=2, sequence_parallel=True),
}


def batch(rows: int) -> Microbatch:
    tokens_BT = torch.randint(0, 59, (rows, 13), generator=torch.Generator().manual_seed(0))
    return Microbatch(tokens_BT[:, :-1], tokens_BT[:, 1:], torch.ones(rows, 12))


def read_and_write(rank: int, folder: Path) -> tuple[float, bool]:
    """Mean loss of the model in `folder`, and whether import_hf and load_hf agree; writes the model beside it."""
    model = ParallelModel(hf_model_config(folder), AdamWConfig(lr=0.1), seed=0, device="cpu")
    load_hf(folder, model.chunks)
    loss, tokens = model.evaluate([batch(2), batch(2)])
    export_hf(model.chunks, folder.with_name("out"), max_shard_size=20_000)
    if len(model.chunks) > 1:
        return loss / tokens, True
    imported = import_hf(folder, device="cpu").state_dict()
    loaded = {name: value for name, value in model.chunks[0].state_dict().items() if isinstance(value, torch.Tensor)}
    return loss / tokens, all(torch.equal(imported[name], value) for name, value in loaded.items())


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_reads_and_writes_the_same_model(name, tmp_path):
    reference = build(name.removesuffix("-interleaved"))
    folder = save(reference, tmp_path / "in")
    per_rank = run_ranks(read_and_write, LAYOUTS[name], folder)
    data = batch(2)
    with torch.no_grad():
        expected = F.cross_entropy(reference(data.tokens_BT).logits.flatten(0, 1), data.labels_BT.flatten()).item()
    for loss, agree in per_rank:
        assert loss == pytest.approx(expected, abs=1e-6)
        assert agree
    same(folder, tmp_path / "out")


def train_in_bf16(rank: int, folder: Path) -> None:
    model = ParallelModel(hf_model_config(folder), AdamWConfig(lr=0.1), seed=0, precision="bf16", device="cpu")
    load_hf(folder, model.chunks)
    model.optimizer.reload_model_params()
    model.train_step([batch(2)], lr=0.0)
    export_hf(model.chunks, folder.with_name("out"))


def test_main_parameters_start_from_what_was_read(tmp_path):
    """A step of size zero writes the main parameters back."""
    folder = save(build("qwen3", torch.bfloat16), tmp_path / "in")
    run_ranks(train_in_bf16, Layout(dp=2, distributed_optimizer=True), folder)
    same(folder, tmp_path / "out")


def fail_together(rank: int, folder: Path) -> tuple[list[str], int]:
    from shared.megatron import hf_files

    said = []
    model = import_hf(folder, device="cpu")
    with pytest.raises(ExportNotWritten) as exists:
        export_hf(model, folder)
    said.append(str(exists.value))
    write = hf_files._write

    def full(file, data):
        raise OSError(28, "No space left on device")

    hf_files._write = full
    with pytest.raises(ExportNotWritten) as disk:
        export_hf(model, folder.with_name("out"))
    said.append(str(disk.value))
    hf_files._write = write
    weights = to_hf_state_dict(model)
    with pytest.raises(ImpossibleLayout, match=r"vocab_size=61 is not a multiple of tp=2"):
        import_hf(folder.with_name("odd"), device="cpu")
    return said, len(weights)


def test_all_ranks_fail_together_and_go_on(tmp_path):
    folder = save(build("llama"), tmp_path / "in")
    save(build("llama", vocab_size=61), tmp_path / "odd")
    (first, count), (second, none) = run_ranks(fail_together, Layout(tp=2), folder)
    assert first == second
    assert "in exists" in first[0]
    assert "No space left" in first[1]
    assert (count, none) == (len(tensors(folder)), 0)
    assert not (tmp_path / "out").exists()
