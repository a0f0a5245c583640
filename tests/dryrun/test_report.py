"""The command: tables that fit a page, JSON, launch files that a shell and our own parser accept, named refusals."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from dataclasses import fields, replace
from pathlib import Path

import pytest

from papers import _cli
from papers.cegppo.full import LAYOUT, SIZES, full
from shared.dryrun.report import GIB, WIDTH, DryRun, _from_root, dry_run, one_node_layout
from shared.dryrun.scripts import layout_flags
from shared.dryrun.work import Assumptions
from shared.experiment.catalog import full_setting
from shared.megatron.layout import ImpossibleLayout, Layout
from shared.rl.full import FullRL
from shared.rl.ranks import FOLLOWS


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


@pytest.mark.parametrize("size", SIZES)
def test_scripts_know_where_they_lie_and_how_long_a_stop_takes(written: Path, size: str) -> None:
    found, script = json.loads((written / size / "dryrun.json").read_text()), (written / size / "train.sbatch")
    assert f"#SBATCH --signal=USR2@{found['stop_seconds']}\n" in script.read_text()
    assert found["stop_seconds"] > found["bound"]["rollout_seconds"] + found["bound"]["train_seconds"]
    assert f"sbatch {script.resolve()}\n" in script.read_text()
    assert _from_root(_cli.ROOT / "runs" / "cegppo") == "runs/cegppo"


def test_every_layout_survives_its_flags() -> None:
    layout = Layout(2, 2, 2, 2, 4, True, 2, True, True, "full")
    chosen = _cli._parser().parse_args(["run", "cegppo", *layout_flags(layout)])
    assert _cli.flags.layout(chosen) == layout
    assert layout_flags(Layout()) == []


def test_a_layout_of_one_process_takes_the_place_of_the_papers(tmp_path: Path) -> None:
    assert _cli.main(["dryrun", "cegppo", "--size", "1.5b", "--dp", "1", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "cegppo" / "full" / "1.5b" / "dryrun.json").read_text())
    assert found["name"] == "1"
    assert found["ranks"][0]["weights"] == 2 * found["counts"]["total"]
    assert found["one_node_layout"]["dp"] == 8


def test_every_rl_papers_layout_is_one_that_the_trainer_follows() -> None:
    for paper in sorted(path.parent.name for path in (_cli.ROOT / "papers").glob("*/full.py")):
        setting = full_setting(paper)
        for size in setting.SIZES:
            whole = setting.full(size)
            if isinstance(whole, FullRL):
                asked = {name for name, value in vars(whole.layout).items() if value != getattr(Layout, name)}
                assert asked <= set(FOLLOWS), f"{paper} {size}"


def test_pipeline_stages_get_a_row_each(seven_b: DryRun) -> None:
    rows = [line for line in seven_b.text().splitlines() if line.startswith(("    0 ", "    1 "))]
    assert len(rows) == 2
    first, last = seven_b.ranks
    assert first.head == 0 < last.head
    assert first.activations["none"] == 2 * last.activations["none"], "1F1B holds two micro-batches on the first stage"
    assert first.optimizer == 12 * seven_b.counts.stages[0].parameters, "nothing shards it here"


def test_memory_is_that_of_the_layouts_own_recomputation(seven_b: DryRun) -> None:
    full_layout = replace(seven_b.layout, recompute="full")
    recomputing = replace(seven_b, layout=full_layout)
    assert recomputing.peak_gib * GIB == max(rank.total("full") for rank in seven_b.ranks)
    assert seven_b.peak_gib * GIB == max(rank.total("none") for rank in seven_b.ranks)
    assert recomputing.peak_gib < seven_b.peak_gib - 10
    assert f"{full_layout}: {recomputing.peak_gib:.1f} GiB" in recomputing.text().replace("\n", " ")
    small = dry_run("cegppo", "1.5b", full("1.5b"), Layout(dp=16, recompute="full"), Assumptions())
    assert f"DP8+recompute-full: {small.one_node[0].total('full') / GIB:.1f} GiB" in small.text()


def test_the_warning_covers_a_step_at_the_limit_and_the_save(seven_b: DryRun) -> None:
    step = seven_b.bound.rollout_seconds + seven_b.bound.train_seconds
    assert 0 < seven_b.stop_seconds - step - 14 * 7.615616512 <= 1, "bfloat16, float32 and two moments, at 1 GB/s"
    slow = replace(seven_b, assumed=Assumptions(disk_gbs=0.1))
    assert slow.stop_seconds > seven_b.stop_seconds + 900


def test_what_does_not_fit_is_said(seven_b: DryRun) -> None:
    assert "20,480 tokens, training's longest" in " ".join(seven_b.text().split())
    assert "Validation's longest has 36,864, 1.97 GiB" in " ".join(seven_b.text().split())
    small = replace(seven_b, assumed=Assumptions(gpu_gib=24.0))
    assert "DOES NOT FIT into 24 GiB" in small.text()
    weights, sequence = 2 * 7_615_616_512, 56 * 1024 * 20_480
    assert small.sequences_in_cache() == int((24 * 0.9 * 2**30 - weights) / sequence)
    assert replace(seven_b, assumed=Assumptions(gpu_gib=12.0)).sequences_in_cache() == 0


def test_every_assumption_has_a_flag() -> None:
    given = {"mfu": 0.4, "gpu_tflops": 500.0, "gpu_gib": 24.0, "mean_prompt": 128, "mean_response": 1024}
    given |= {"rollout_speed": 900.0, "disk_gbs": 2.5}
    assert set(given) == {field.name for field in fields(Assumptions)}
    words = [word for name, value in given.items() for word in ("--" + name.replace("_", "-"), str(value))]
    assert _cli.flags.assumptions(_cli._parser().parse_args(["dryrun", "cegppo", *words])) == Assumptions(**given)
    assert _cli.flags.assumptions(_cli._parser().parse_args(["dryrun", "cegppo"])) == Assumptions()


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
        (["dryrun", "cegppo", "--mean-response", "0"], "tokens of an average response"),
        (["dryrun", "cegppo", "--mean-prompt", "4097"], "limit of 4096"),
        (["dryrun", "cegppo", "--gpu-tflops", "0"], "gpu_tflops=0 is out of range"),
        (["dryrun", "cegppo", "--gpu-gib", "nan"], "GiB of one GPU"),
        (["dryrun", "cegppo", "--disk-gbs", "inf"], "GB per second"),
        (["run", "cegppo", "--scale", "full"], "python -m papers dryrun cegppo"),
    ],
)
def test_refusals_name_the_way_out(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _cli.main([*words, "--out", str(tmp_path)]) == _cli.USAGE_ERROR
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.json"))
