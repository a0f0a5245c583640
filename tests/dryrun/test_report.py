"""The command: tables that fit a page, JSON, launch files that a shell and our own parser accept, named refusals."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from papers import _cli
from papers.cegppo.full import LAYOUT, SIZES, full
from shared.dryrun.report import WIDTH, DryRun, dry_run, one_node_layout
from shared.dryrun.scripts import launch_files, layout_flags
from shared.dryrun.work import Assumptions
from shared.megatron.layout import ImpossibleLayout, Layout


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    assert _cli.main(["dryrun", "cegppo", "--out", str(out)]) == 0
    return out / "cegppo" / "full"


@pytest.fixture(scope="module")
def seven_b() -> DryRun:
    return dry_run("cegppo", "7b", full("7b"), Layout(tp=4, pp=2, dp=4, sequence_parallel=True), Assumptions())


@pytest.mark.parametrize("size", SIZES)
def test_tables_fit_the_page_and_agree_with_the_json(written: Path, size: str) -> None:
    text, found = (written / size / "dryrun.txt").read_text(), json.loads((written / size / "dryrun.json").read_text())
    assert max(map(len, text.splitlines())) <= WIDTH
    assert f"{found['counts']['total']:,} parameters" in text
    assert f"{found['peak_gib']:.1f} GiB, fits into 79 GiB" in text
    assert f"{found['hours_mean']:,.0f}" in text
    assert "ASSUMED" in text
    rank = found["ranks"][0]
    parts = rank["weights"] + rank["gradients"] + rank["optimizer"] + rank["head"]
    assert found["total_none"][0] == parts + rank["activations"]["none"]


@pytest.mark.parametrize("size", SIZES)
def test_shells_read_the_scripts_and_our_parser_their_commands(written: Path, size: str) -> None:
    scripts = [path for path in (written / size).iterdir() if path.suffix in (".sh", ".sbatch")]
    assert len(scripts) == 5
    bash = shutil.which("bash")
    assert bash
    for script in scripts:
        subprocess.run([bash, "-n", str(script)], check=True)
        assert script.name in (written / size / "README.md").read_text()
        command = script.read_text().partition("-m papers ")[2].split("'")[0]
        if command:
            chosen = _cli._parser().parse_args(shlex.split(command))
            assert (chosen.paper, chosen.scale, chosen.arm) == ("cegppo", "full", [size])
            assert _cli.flags.layout(chosen) in (LAYOUT[size], one_node_layout(LAYOUT[size], 8))


def run_with(stub: str, body: str, script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The script, with a program `stub` of ours in the place of the real one."""
    (folder / stub).write_text(f"#!/bin/sh\n{body}\n")
    (folder / stub).chmod(0o755)
    (folder / "script.sh").write_text(script)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}"}
    command = ["bash", "script.sh"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=60)


def test_the_one_node_script_starts_torchrun_with_the_flags_of_its_layout(tmp_path: Path) -> None:
    small = one_node_layout(LAYOUT["7b"], 8)
    assert small is not None
    script = launch_files("cegppo", "7b", full("7b"), LAYOUT["7b"], small)["train-one-node.sh"]
    words = run_with("torchrun", 'echo "$@"', script, tmp_path).stdout.split()
    assert words[:4] == ["--standalone", "--nproc-per-node", "8", "-m"]
    assert words[-len(layout_flags(small)) :] == layout_flags(small)


def test_the_servers_get_a_gpu_and_a_port_each_and_end_together(tmp_path: Path) -> None:
    """The server on GPU 5 fails; the script ends with it, and takes the others along."""
    script = launch_files("cegppo", "7b", full("7b"), LAYOUT["7b"], None)["vllm-servers.sh"]
    body = 'echo "$CUDA_VISIBLE_DEVICES $@"\n[ "$CUDA_VISIBLE_DEVICES" = 5 ] && sleep 1 && exit 3\nexec sleep 50'
    assert run_with("vllm", body, script, tmp_path).returncode == 3
    logs = sorted(path.read_text() for path in tmp_path.glob("vllm-*.log"))
    assert [log.split()[0] for log in logs] == [str(gpu) for gpu in range(8)]
    assert [log.split()[-3:] for log in logs] == [[str(8000 + gpu), "--seed", str(gpu)] for gpu in range(8)]
    assert all('{"backend": "nccl"}' in log for log in logs)


def test_every_layout_survives_its_flags() -> None:
    layout = Layout(2, 2, 2, 2, 4, True, 2, True, True, "full")
    chosen = _cli._parser().parse_args(["run", "cegppo", *layout_flags(layout)])
    assert _cli.flags.layout(chosen) == layout
    assert layout_flags(Layout()) == []


def test_pipeline_stages_get_a_row_each(seven_b: DryRun) -> None:
    rows = [line for line in seven_b.text().splitlines() if line.split()[:1] in (["0"], ["1"])]
    assert len(rows) == 2
    first, last = seven_b.ranks
    assert first.head == 0 < last.head
    assert first.activations["none"] == 2 * last.activations["none"], "1F1B holds two micro-batches on the first stage"
    assert first.optimizer == 12 * seven_b.counts.stages[0].parameters, "nothing shards it here"


def test_what_does_not_fit_is_said(seven_b: DryRun) -> None:
    small = replace(seven_b, assumed=Assumptions(gpu_gib=24.0))
    assert "DOES NOT FIT into 24 GiB" in small.text()
    weights, sequence = 2 * 7_615_616_512, 56 * 1024 * 20_480
    assert small.sequences_in_cache() == int((24 * 0.9 * 2**30 - weights) / sequence)
    assert replace(seven_b, assumed=Assumptions(gpu_gib=12.0)).sequences_in_cache() == 0


@pytest.mark.parametrize(
    ("layout", "fix"), [(Layout(tp=8), "lower tp"), (Layout(tp=4, dp=3), "change dp"), (Layout(ep=2, dp=8), "set ep=1")]
)
def test_impossible_layouts_are_refused_before_anything_is_built(layout: Layout, fix: str) -> None:
    with pytest.raises(ImpossibleLayout, match=fix):
        dry_run("cegppo", "7b", full("7b"), layout, Assumptions())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dryrun", "cegppo", "--size", "7bb"], "7b"),
        (["dryrun", "cegpo"], "cegppo"),
        (["dryrun", "klear_gppo"], "klear_gppo"),
        (["dryrun", "cegppo", "--tp", "3"], "lower tp"),
        (["dryrun", "cegppo", "--mfu", "35"], "at most 1"),
        (["dryrun", "cegppo", "--rollout-speed", "0"], "tokens per second"),
        (["dryrun", "cegppo", "--mean-response", "20000"], "limit of 16384"),
        (["run", "cegppo", "--scale", "full"], "python -m papers dryrun cegppo"),
    ],
)
def test_refusals_name_the_way_out(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _cli.main([*words, "--out", str(tmp_path)]) == _cli.USAGE_ERROR
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.json"))
