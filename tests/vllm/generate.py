"""Greedy tokens of vLLM, in a process of its own: it wants other process groups than Megatron, and its own OpenMP.

python -m tests.vllm.generate '{"folders": [...], "prompts": [[1, 2], ...], "count": 16}'       # JSON on the last line
"""

import gc
import json
import sys
from typing import Any


def tokens(folder: str, prompts: list[list[int]], count: int) -> list[list[int]]:
    """`count` greedy tokens after each prompt, end tokens ignored."""
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    engine: Any = LLM(
        model=folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=8,
        enable_prefix_caching=False,
        seed=0,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    answers = [list(output.outputs[0].token_ids) for output in outputs]
    del engine
    gc.collect()
    return answers


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    answers = {folder: tokens(folder, request["prompts"], request["count"]) for folder in request["folders"]}
    print(json.dumps(answers))
