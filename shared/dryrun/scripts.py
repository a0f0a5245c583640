"""Launch files of an RL run at full scale: torchrun on one node and on several, Slurm, vLLM servers.

    files = launch_files("cegppo", "7b", full("7b"), one_node_layout, "runs/cegppo/full/7b", stop_seconds=340)
    for name, text in files.items(): ...

The training commands are those that `python -m papers run` will take once scale full is built; until then it refuses by
name. Tests run the scripts with stand-ins for torchrun, vLLM and Slurm's programs, and vLLM's own parser over the
servers' flags. None has run on a GPU yet.
"""

from __future__ import annotations

import dataclasses
import shlex

from shared.megatron.layout import Layout
from shared.rl.full import FullRL

GPU_SHARE = 0.9
CPUS_PER_GPU = 4  # as in shared/experiment/cluster.py
LONGEST_WARNING = 65_535  # that sbatch takes
FIRST_PORT = 8000
RENDEZVOUS_PORT = 29500
NOT_BUILT = "Scale full is not built yet: until it is, the training command below refuses and says what is missing."


def launch_files(
    paper: str, size: str, full: FullRL, one_node: Layout | None, folder: str, stop_seconds: int
) -> dict[str, str]:
    """File name -> content.

    `one_node` is the layout for a single node, None if none fits. `folder` is where the files will lie, seen from the
    root of the clone. `stop_seconds` is how long ranks may take to finish a step and save.
    """
    here = shlex.quote(folder)
    files = {
        "README.md": _readme(paper, size, full, one_node),
        "train-multi-node.sh": _multi_node(paper, size, full, here),
        "train.sbatch": _slurm_training(paper, size, full, here, stop_seconds),
        "vllm-servers.sh": _servers(full),
        "vllm-servers.sbatch": _slurm_servers(paper, size, full, here),
    }
    if one_node:
        files["train-one-node.sh"] = _one_node(paper, size, one_node, here)
    return files


def training_command(paper: str, size: str, layout: Layout) -> str:
    """Words after `-m papers`, quoted for a shell."""
    words = ["run", paper, "--scale", "full", "--arm", size, "--seed", "0"]
    return shlex.join([*words, *layout_flags(layout)])


def layout_flags(layout: Layout) -> list[str]:
    """The flags of `python -m papers run` that mean `layout`."""
    flags: list[str] = []
    for field in dataclasses.fields(layout):
        value, flag = getattr(layout, field.name), "--" + field.name.replace("_", "-")
        if value != field.default:
            flags += [flag] if value is True else [flag, str(value)]
    return flags


def server_tokens(full: FullRL) -> int:
    """Tokens of the longest sequence that a server must hold: in training or in validation."""
    return full.max_prompt_tokens + max(full.max_response_tokens, full.validation.max_response_tokens)


def server_arguments(full: FullRL) -> list[str]:
    """Arguments of `vllm serve` for one server on one GPU, port aside (vLLM 0.32).

    `--generation-config vllm` keeps the model's own sampling defaults out, `processed_logprobs` are those of the
    distribution that was sampled from, and cached prefixes would survive a change of weights.
    """
    return [
        full.model,
        *("--dtype", "bfloat16"),
        *("--max-model-len", str(server_tokens(full))),
        *("--gpu-memory-utilization", str(GPU_SHARE)),
        *("--generation-config", "vllm"),
        *("--logprobs-mode", "processed_logprobs"),
        "--no-enable-prefix-caching",
        *("--weight-transfer-config", '{"backend": "nccl"}'),
    ]


def _nodes(full: FullRL) -> tuple[int, int]:
    """(nodes, processes per node) of the training."""
    layout = full.layout
    per_node = min(full.cluster.gpus_per_node, layout.world_size)
    return layout.world_size // per_node, per_node


def _one_node(paper: str, size: str, layout: Layout, here: str) -> str:
    return f"""#!/usr/bin/env bash
# {paper} {size} on one node with {layout.world_size} GPUs: {layout}. Run in the root of the clone:
#   bash {here}/train-one-node.sh
# {NOT_BUILT}
set -euo pipefail
exec torchrun --standalone --nproc-per-node {layout.world_size} \\
    -m papers {training_command(paper, size, layout)}
"""


def _multi_node(paper: str, size: str, full: FullRL, here: str) -> str:
    layout, (nodes, per_node) = full.layout, _nodes(full)
    return f"""#!/usr/bin/env bash
# {paper} {size} on {nodes} nodes with {per_node} GPUs each: {layout}. Run in the root of the clone, on every node:
#   NODE_RANK=0 MASTER_ADDR=first-node bash {here}/train-multi-node.sh      ... up to NODE_RANK={nodes - 1}
# {NOT_BUILT}
set -euo pipefail
: "${{NODE_RANK:?number of this node, from 0}}" "${{MASTER_ADDR:?host name of node 0}}"
exec torchrun --nnodes {nodes} --node-rank "$NODE_RANK" --nproc-per-node {per_node} \\
    --master-addr "$MASTER_ADDR" --master-port "${{MASTER_PORT:-{RENDEZVOUS_PORT}}}" \\
    -m papers {training_command(paper, size, layout)}
"""


def _slurm_training(paper: str, size: str, full: FullRL, here: str, stop_seconds: int) -> str:
    layout, (nodes, per_node) = full.layout, _nodes(full)
    warning = min(stop_seconds, LONGEST_WARNING)
    return f"""#!/bin/bash
#SBATCH --job-name={paper}-{size}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={per_node}
#SBATCH --cpus-per-task={CPUS_PER_GPU * per_node}
#SBATCH --time=24:00:00
#SBATCH --signal=USR2@{warning}
#SBATCH --output={here}/%x-%j.log
# {layout}. Submit in the root of the clone, which all nodes must see: sbatch {here}/train.sbatch
# Slurm's signal makes every rank finish its step and save (torchrun itself ignores it); submit again to go on. It comes
# {warning} s before the end, which a step at the limit and a checkpoint may take by the assumptions in dryrun.txt.
# {NOT_BUILT}
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
export MASTER_ADDR
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 bash -c 'trap "" USR2; exec torchrun \\
    --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" --nproc-per-node {per_node} \\
    --master-addr "$MASTER_ADDR" --master-port {RENDEZVOUS_PORT} \\
    -m papers {training_command(paper, size, layout)}'
"""


def _servers(full: FullRL) -> str:
    gpus = full.cluster.gpus_per_node
    return f"""#!/usr/bin/env bash
# One vLLM server per GPU of this node, ports {FIRST_PORT} to {FIRST_PORT + gpus - 1}. They end with this script.
# The development mode opens the endpoints for weight transfer (/init_weight_transfer_engine, /start_weight_update,
# /update_weights, /finish_weight_update): keep the ports inside the cluster.
# Seeds differ between servers, also of other nodes: without Slurm, set SLURM_NODEID=0, 1, ... on the nodes.
set -euo pipefail
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
for gpu in $(seq 0 {gpus - 1}); do
    CUDA_VISIBLE_DEVICES=$gpu VLLM_SERVER_DEV_MODE=1 vllm serve {shlex.join(server_arguments(full))} \\
        --port $(({FIRST_PORT} + gpu)) --seed $((${{SLURM_NODEID:-0}} * {gpus} + gpu)) \\
        > "vllm-$(hostname)-$gpu.log" 2>&1 &
done
wait -n
"""


def _slurm_servers(paper: str, size: str, full: FullRL, here: str) -> str:
    return f"""#!/bin/bash
#SBATCH --job-name={paper}-{size}-rollouts
#SBATCH --nodes={full.rollout_nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={full.cluster.gpus_per_node}
#SBATCH --cpus-per-task={CPUS_PER_GPU * full.cluster.gpus_per_node}
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
# Submit in the folder of vllm-servers.sh, which all nodes must see: cd {here} && sbatch vllm-servers.sbatch
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 bash vllm-servers.sh
"""


def _readme(paper: str, size: str, full: FullRL, one_node: Layout | None) -> str:
    layout, (nodes, per_node) = full.layout, _nodes(full)
    small = (
        f"- `train-one-node.sh`: training on one node with {one_node.world_size} GPUs, {one_node}\n" if one_node else ""
    )
    return f"""# {paper} {size}: launch files

Made by `python -m papers dryrun {paper} --size {size}`, which overwrites them. None has run on a GPU yet.
**{NOT_BUILT}**

- `dryrun.txt`, `dryrun.json`: parameters, memory, work and hours, with the assumptions behind them
{small}- `train-multi-node.sh`: training on {nodes} nodes with {per_node} GPUs each, {layout}; start it on every node
- `train.sbatch`: the same under Slurm
- `vllm-servers.sh`: rollouts, {full.cluster.gpus_per_node} vLLM servers on one node, one per GPU
- `vllm-servers.sbatch`: the same on {full.rollout_nodes} nodes under Slurm

The servers need the package `vllm` 0.32 (CUDA) in an environment of their own, and fetch `{full.model}` from the hub.
"""
