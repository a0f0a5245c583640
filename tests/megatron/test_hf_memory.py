"""Peak memory of reading and writing a model of 236 MB, a rank at a time: below 1.3 times what the rank holds."""

import shutil
from pathlib import Path

import pytest
import torch

from shared.megatron.config import ModelConfig
from shared.megatron.hf import export_hf, import_hf
from shared.megatron.layout import Layout
from shared.megatron.model import build_chunks, build_model
from tests.megatron.models import LLAMA
from tests.ranks import run_ranks

MODEL = ModelConfig(8, 1024, 16, 8, 64, 2816, 8192, 64, tie_embeddings=False)
LIMIT = 1.3


def resident(field: str) -> int:
    """Bytes of this process as Linux counts them: VmRSS now, VmHWM at the highest since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def forget_the_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peaks(rank: int, folder: Path) -> tuple[float, float]:
    """Peak of reading, then of writing with the model in memory, over the bytes that this rank holds.

    A small model goes first, because imports and buffers of the network are not the model's.
    """
    export_hf(import_hf(folder.with_name("small"), device="cpu"), folder.with_name("small-out"))
    before = resident("VmRSS")
    forget_the_peak()
    model = import_hf(folder, device="cpu")
    size = sum(parameter.nbytes for parameter in model.parameters())
    reading = resident("VmHWM") - before
    without = resident("VmRSS") - size
    forget_the_peak()
    export_hf(model, folder.with_name("out"), max_shard_size=10**8)
    return reading / size, (resident("VmHWM") - without) / size


@pytest.fixture
def folder(tmp_path):
    """A folder that does not stay: pytest keeps the files of its last runs."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of a process's memory")
@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2)], ids=str)
def test_peak_memory(folder, layout):
    (model,) = build_chunks(MODEL, None, "cpu", dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1)
    export_hf(model, folder / "in", max_shard_size=10**8)
    export_hf(build_model(LLAMA, seed=0, device="cpu"), folder / "small")
    del model
    for reading, writing in run_ranks(peaks, layout, folder / "in"):
        assert 1 <= reading < LIMIT
        assert 1 <= writing < LIMIT
