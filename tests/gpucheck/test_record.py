"""The committed file of a GPU check and the line on the board."""

from __future__ import annotations

import json

import pytest

from shared.gpucheck import record
from shared.gpucheck.peaks import peak_tflops


def result(**changes):
    statuses = {"greedy": "pass", "pretrain": "fail", "tp2": "skipped", "learner": "pass"}
    base = dict.fromkeys(record.FIELDS, "x") | {"device": "NVIDIA H100 80GB HBM3", "commit": "c" * 40}
    return base | {"dirty": False, "checks": [{"name": n, "status": s} for n, s in statuses.items()]} | changes


def test_the_board_says_never_run_until_there_is_a_file(tmp_path):
    assert record.line(record.load_all(tmp_path), "docs") == "GPU check: never run ([what it checks](docs/gpu.md))."
    path = record.write(result(), tmp_path)
    assert path.relative_to(tmp_path).as_posix() == "results/gpu-check/nvidia-h100-80gb-hbm3.json"
    said = record.line(record.load_all(tmp_path), "../docs")
    assert "NVIDIA H100 80GB HBM3 at `ccccccc`: 2 passed, 1 failed (pretrain), 1 skipped" in said
    assert "never" not in said
    record.write(result(device="NVIDIA L4", dirty=True), tmp_path)
    assert "NVIDIA L4 at `ccccccc` with uncommitted changes" in record.line(record.load_all(tmp_path), "docs")


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        json.dumps({"device": "x", "checks": []}),
        json.dumps(result(checks=[{"name": "a", "status": "fine"}])),
        json.dumps(result(checks=[{"status": "pass", "nom": 1}, {"name": "a"}])),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, content):
    path = record.path_of("x", tmp_path)
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(record.BadGPURecord, match=r"x\.json"):
        record.load_all(tmp_path)


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_only_the_gpu_itself_has_its_peak(device, peak):
    assert peak_tflops(device) == peak
