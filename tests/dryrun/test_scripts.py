"""The launch files at work: stand-ins for torchrun, vLLM and Slurm's programs print what they were called with."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from papers.cegppo.full import LAYOUT, full
from shared.dryrun.report import one_node_layout
from shared.dryrun.scripts import launch_files, layout_flags

HERE = "runs/cegppo/full/7b"
SRUN = """while [ "${1#--}" != "$1" ]; do echo "option $1"; shift; done
for node in 0 1 2 3; do SLURM_NODEID=$node SLURM_NNODES=4 "$@"; done"""
SCONTROL = """[ "$1 $2 $3" = "show hostnames node[5-8]" ] || exit 1
for node in 5 6 7 8; do echo "node$node"; sleep 0.05; done  # a reader that leaves early kills it"""


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    return launch_files("cegppo", "7b", full("7b"), one_node_layout(LAYOUT["7b"], 8), HERE, stop_seconds=340)


def run_with(stubs: dict[str, str], script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The script, with programs of ours in the place of the real ones."""
    programs = folder / "bin"
    programs.mkdir()
    for name, body in stubs.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    (folder / "script.sh").write_text(script)
    environment["PATH"] = f"{programs}:{os.environ['PATH']}"
    command = ["bash", "script.sh"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=60)


def options(script: str) -> dict[str, str]:
    """What `#SBATCH` lines ask for."""
    lines = [line for line in script.splitlines() if line.startswith("#SBATCH --")]
    return dict(line.removeprefix("#SBATCH --").split("=", 1) for line in lines)


def value(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def test_one_node_starts_torchrun_with_the_flags_of_its_layout(files: dict[str, str], tmp_path: Path) -> None:
    small = one_node_layout(LAYOUT["7b"], 8)
    assert small is not None
    words = run_with({"torchrun": 'echo "$@"'}, files["train-one-node.sh"], tmp_path).stdout.split()
    assert words[:4] == ["--standalone", "--nproc-per-node", "8", "-m"]
    assert words[-len(layout_flags(small)) :] == layout_flags(small)


@pytest.mark.parametrize("node", ["0", "3"])
def test_by_hand_every_node_says_which_it_is_and_where_to_meet(
    files: dict[str, str], tmp_path: Path, node: str
) -> None:
    script = files["train-multi-node.sh"]
    done = run_with({"torchrun": 'echo "$@"'}, script, tmp_path, NODE_RANK=node, MASTER_ADDR="node5")
    words = done.stdout.split()
    assert (value(words, "--nnodes"), value(words, "--nproc-per-node")) == ("4", "8")
    assert (value(words, "--node-rank"), value(words, "--master-addr")) == (node, "node5")
    assert value(words, "--master-port") == "29500"
    assert words[-len(layout_flags(LAYOUT["7b"])) :] == layout_flags(LAYOUT["7b"])


def test_by_hand_a_node_without_a_number_is_refused(files: dict[str, str], tmp_path: Path) -> None:
    done = run_with({"torchrun": 'echo "$@"'}, files["train-multi-node.sh"], tmp_path, MASTER_ADDR="node5")
    assert done.returncode != 0
    assert "number of this node" in done.stderr


def test_under_slurm_all_nodes_meet_on_the_first(files: dict[str, str], tmp_path: Path) -> None:
    script = files["train.sbatch"]
    stubs = {"torchrun": "trap -p USR2\necho $(pwd) $@", "srun": SRUN, "scontrol": SCONTROL}
    root = tmp_path / "clone"
    root.mkdir()
    environment = {"SLURM_JOB_NODELIST": "node[5-8]", "SLURM_SUBMIT_DIR": str(root), "SLURM_CPUS_PER_TASK": "32"}
    lines = run_with(stubs, script, tmp_path, **environment).stdout.splitlines()
    asked = [line.removeprefix("option ") for line in lines if line.startswith("option")]
    assert asked == ["--cpus-per-task=32", "--kill-on-bad-exit=1"]
    agents = [line.split() for line in lines if "-m papers" in line]
    assert [value(words, "--node-rank") for words in agents] == ["0", "1", "2", "3"]
    assert {value(words, "--master-addr") for words in agents} == {"node5"}
    assert {(value(words, "--nnodes"), value(words, "--nproc-per-node")) for words in agents} == {("4", "8")}
    assert {words[0] for words in agents} == {str(root)}
    assert agents[0][-len(layout_flags(LAYOUT["7b"])) :] == layout_flags(LAYOUT["7b"])
    assert lines.count("trap -- '' SIGUSR2") == 4, "the warning is for the ranks: it would end torchrun"


def test_slurm_gives_a_node_its_cpus_and_ranks_the_time_to_save(files: dict[str, str]) -> None:
    train, servers = options(files["train.sbatch"]), options(files["vllm-servers.sbatch"])
    assert (train["nodes"], train["gpus-per-node"], train["cpus-per-task"]) == ("4", "8", "32")
    assert (servers["nodes"], servers["gpus-per-node"], servers["cpus-per-task"]) == ("12", "8", "32")
    assert train["signal"] == "USR2@340"
    assert train["output"] == f"{HERE}/%x-%j.log", "a log in the root would make the clone look changed"
    for name, how in (("train.sbatch", "sbatch"), ("train-multi-node.sh", "bash"), ("train-one-node.sh", "bash")):
        assert f"{how} {HERE}/{name}" in files[name]
    slow = launch_files("cegppo", "7b", full("7b"), None, HERE, stop_seconds=100_000)
    assert options(slow["train.sbatch"])["signal"] == "USR2@65535", "sbatch takes no more"


def test_the_servers_get_a_gpu_and_a_port_each_and_end_together(files: dict[str, str], tmp_path: Path) -> None:
    """The server on GPU 5 fails; the script ends with it, and takes the others along."""
    body = 'echo "$CUDA_VISIBLE_DEVICES $@"\n[ "$CUDA_VISIBLE_DEVICES" = 5 ] && sleep 1 && exit 3\nexec sleep 50'
    assert run_with({"vllm": body}, files["vllm-servers.sh"], tmp_path).returncode == 3
    logs = sorted(path.read_text() for path in tmp_path.glob("vllm-*.log"))
    assert [log.split()[0] for log in logs] == [str(gpu) for gpu in range(8)]
    assert [log.split()[-3:] for log in logs] == [[str(8000 + gpu), "--seed", str(gpu)] for gpu in range(8)]
    assert all('{"backend": "nccl"}' in log for log in logs)
    assert {value(log.split(), "--max-model-len") for log in logs} == {str(4096 + 32_768)}, "validation's longest"


def test_no_two_servers_of_a_job_sample_with_one_seed(files: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "vllm-servers.sh").write_text(files["vllm-servers.sh"])
    once = 'echo "${@: -1}" >> seeds\nexec sleep 1'
    environment = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_CPUS_PER_TASK": "32"}
    done = run_with({"vllm": once, "srun": SRUN}, files["vllm-servers.sbatch"], tmp_path, **environment)
    assert "option --cpus-per-task=32\noption --kill-on-bad-exit=1\n" in done.stdout
    assert sorted(map(int, (tmp_path / "seeds").read_text().split())) == list(range(32))
