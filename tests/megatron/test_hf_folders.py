"""Folders in Hugging Face format, in and out: transformers is the oracle in both directions."""

import fcntl
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from shared.engines.contracts import Sampling
from shared.engines.native import NativeEngine
from shared.megatron import hf_export
from shared.megatron.config import MoEConfig
from shared.megatron.hf import (
    DamagedFiles,
    ExportNotWritten,
    TokenizerDoesNotFit,
    UnsupportedArchitecture,
    WeightsDoNotFit,
    export_hf,
    hf_model_config,
    import_hf,
    load_hf,
)
from shared.megatron.layout import Layout
from shared.megatron.model import build_model, config_of, forward_logits
from tests.megatron.hf_models import ARCHITECTURES, SIZES, build, make_tokenizer, same, save, tensors
from tests.megatron.models import LLAMA, randomise
from tests.ranks import run_ranks


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request, tmp_path_factory):
    """(transformers model, its folder of several shards, our model read from there)."""
    reference = build(request.param)
    folder = save(reference, tmp_path_factory.mktemp(request.param))
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return reference, folder, import_hf(folder, device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(build("llama"), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def tokens_BT():
    return torch.randint(0, 59, (3, 17), generator=torch.Generator().manual_seed(0))


def greedy(model, prompt, count):
    sequence = list(prompt)
    for _ in range(count):
        sequence.append(int(forward_logits(model, torch.tensor([sequence]))[0, -1].argmax()))
    return sequence[len(prompt) :]


@torch.no_grad()
def test_logits_and_greedy_tokens_equal_transformers(case, tokens_BT):
    reference, _, ours = case
    expected = reference(tokens_BT).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(forward_logits(ours, tokens_BT), expected, rtol=0, atol=1e-5)
    prompt = tokens_BT[:1, :5]
    generated = reference.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)[0, 5:].tolist()
    assert greedy(ours, prompt[0].tolist(), 12) == generated


def test_the_native_engine_knows_qwen2s_biases(tmp_path):
    reference = build("qwen2")
    engine = NativeEngine(import_hf(save(reference, tmp_path), device="cpu"), eos_id=60, pad_id=59)
    rollouts = engine.generate([[5, 6, 7], [1]], Sampling(12, greedy=True), n=1, seed=0)
    for row, prompt in enumerate([[5, 6, 7], [1]]):
        expected = reference.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :]
        assert rollouts.tokens_NT[row, : rollouts.lengths_N[row]].tolist() == expected.tolist()


def test_a_round_trip_returns_every_byte(case, tmp_path):
    _, folder, ours = case
    export_hf(ours, tmp_path / "out", max_shard_size=20_000)
    same(folder, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")}
    assert set(index["weight_map"].values()) == sizes.keys()
    assert max(sizes.values()) < 24_000, "a header on top of max_shard_size"
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(tmp_path / "out").values())
    assert hf_model_config(tmp_path / "out") == config_of(ours)


def test_transformers_loads_what_we_export(case, tokens_BT, tmp_path):
    reference, _, ours = case
    export_hf(ours, tmp_path / "out")
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(theirs) is type(reference)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.equal(theirs.eval()(tokens_BT).logits, reference(tokens_BT).logits)


def test_older_readers_find_their_names(case, tmp_path):
    export_hf(case[2], tmp_path / "out")
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (fields["rope_theta"], fields["torch_dtype"]) == (500.0, "float32")
    assert fields["architectures"] == [type(case[0]).__name__]
    assert fields.get("num_experts", 4) == 4
    assert fields["eos_token_id"] is None, "transformers' default for Llama would end texts at token 2"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_of_the_files_is_kept_bit_for_bit(dtype, tokens_BT, tmp_path):
    reference = build("qwen3", dtype)
    model = import_hf(save(reference, tmp_path / "in"), device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    export_hf(model, tmp_path / "out")
    same(tmp_path / "in", tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == dtype
    with torch.no_grad():
        exact = build("qwen3")(tokens_BT).logits
        ours, theirs = (
            (logits - exact).abs().mean() for logits in (forward_logits(model, tokens_BT), reference(tokens_BT).logits)
        )
    assert 0 < ours < 1.2 * theirs


def test_the_dtype_may_be_chosen_in_both_directions(folder, tmp_path):
    wide = import_hf(folder, device="cpu")
    export_hf(wide, tmp_path / "narrow", dtype=torch.bfloat16)
    narrow = import_hf(folder, device="cpu", dtype=torch.bfloat16)
    export_hf(narrow, tmp_path / "same")
    same(tmp_path / "narrow", tmp_path / "same")
    assert {t.dtype for t in tensors(tmp_path / "narrow").values()} == {torch.bfloat16}


def test_existing_models_are_filled(folder):
    model = build_model(hf_model_config(folder), seed=3, device="cpu")
    load_hf(folder, [model])
    for parameter, expected in zip(model.parameters(), import_hf(folder, device="cpu").parameters(), strict=True):
        assert torch.equal(parameter, expected)


def test_weights_of_another_architecture_are_named(folder):
    with pytest.raises(WeightsDoNotFit, match=r"num_layers=4 instead of 2.*vocab_size=62 instead of 50"):
        load_hf(folder, [build_model(LLAMA, seed=0, device="cpu")])


def test_what_no_hugging_face_architecture_computes_is_refused(tmp_path):
    odd = replace(LLAMA, moe=MoEConfig(2, 1, 24, norm_topk_prob=False))
    with pytest.raises(UnsupportedArchitecture, match="Mixtral normalises"):
        export_hf(build_model(odd, seed=0, device="cpu"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_qwen2_with_heads_of_a_size_that_vllm_would_not_read_is_refused(tmp_path):
    odd = build_model(replace(LLAMA, qkv_bias=True, head_dim=16), seed=0, device="cpu")
    with pytest.raises(UnsupportedArchitecture, match="train with head_dim=8"):
        export_hf(odd, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_parameter_without_a_place_in_the_files_is_not_left_out_in_silence(tmp_path):
    model = build_model(LLAMA, seed=0, device="cpu")
    model.decoder.layers[1].mlp.register_parameter("gain", torch.nn.Parameter(torch.ones(3)))
    with pytest.raises(UnsupportedArchitecture, match=r"mlp.gain of layer 1 .* has no place"):
        export_hf(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def rewrite(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def resave(folder: Path, change) -> None:
    """Change the tensors of the shard that holds the final norm."""
    from safetensors.torch import load_file, save_file

    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    path = folder / names["model.norm.weight"]
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def truncate(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


SHARD = "model-00002-of-"


def shard(folder: Path) -> Path:
    return next(folder.glob(f"{SHARD}*"))


@pytest.mark.parametrize(
    ("spoil", "error", "says"),
    [
        (lambda f: (f / "config.json").unlink(), DamagedFiles, "config.json cannot be read"),
        (lambda f: truncate(f / "config.json", 40), DamagedFiles, "config.json cannot be read"),
        (lambda f: rewrite(f, model_type="gemma"), UnsupportedArchitecture, "model_type='gemma'"),
        (lambda f: rewrite(f, hidden_size="large"), DamagedFiles, "transformers refuses .*config.json"),
        (lambda f: rewrite(f, mlp_bias=True), UnsupportedArchitecture, "mlp_bias=True"),
        (lambda f: rewrite(f, num_hidden_layers=5), WeightsDoNotFit, r"missing .*layers.4.* and 4 more, unknown \[\]"),
        (lambda f: rewrite(f, intermediate_size=48), WeightsDoNotFit, r"gate_proj.weight is F32 of shape \(40, 32\)"),
        (lambda f: shard(f).unlink(), DamagedFiles, f"{SHARD}.* is missing, and the index names it"),
        (lambda f: truncate(shard(f), 5), DamagedFiles, f"{SHARD}.* is not a whole safetensors file"),
        (lambda f: truncate(shard(f), 200), DamagedFiles, f"{SHARD}.* is not a whole safetensors file"),
        (lambda f: truncate(shard(f), -1), DamagedFiles, f"{SHARD}.* is not a whole safetensors file"),
        (lambda f: truncate(f / "model.safetensors.index.json", 99), DamagedFiles, "index.json cannot be read"),
        (lambda f: [p.unlink() for p in f.glob("model*")], DamagedFiles, "neither model.safetensors nor"),
        (lambda f: resave(f, lambda w: w.pop("model.norm.weight")), DamagedFiles, "holds model.norm.weight, and it do"),
        (lambda f: resave(f, lambda w: w.update(extra=torch.zeros(2))), WeightsDoNotFit, r"unknown \['extra'\]"),
        (
            lambda f: resave(f, lambda w: w.update({"model.norm.weight": torch.ones(33)})),
            WeightsDoNotFit,
            r"model.norm.weight is F32 of shape \(33,\)",
        ),
        (
            lambda f: resave(f, lambda w: w.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)})),
            WeightsDoNotFit,
            "model.norm.weight is I8",
        ),
        (
            lambda f: resave(f, lambda w: w.update({"model.norm.weight": torch.ones(32, dtype=torch.bfloat16)})),
            WeightsDoNotFit,
            "mixes BF16, F32: choose one with dtype=",
        ),
        (
            lambda f: resave(f, lambda w: w.update({"lm_head.weight": torch.zeros(62, 32)})),
            WeightsDoNotFit,
            "lm_head.weight differs",
        ),
    ],
)
def test_folders_that_cannot_be_read_are_named(folder, tmp_path, spoil, error, says, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("memory was taken before the folder was found bad")

    monkeypatch.setattr("shared.megatron.hf.build_chunks", never)
    shutil.copytree(folder, tmp_path / "in")
    spoil(tmp_path / "in")
    with pytest.raises(error, match=says):
        import_hf(tmp_path / "in", device="cpu")


def test_an_index_names_files_of_its_folder_only(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "in")
    path = tmp_path / "in" / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("model-00001", "../model-00001"))
    with pytest.raises(DamagedFiles, match="not a file of this folder"):
        import_hf(tmp_path / "in", device="cpu")


@pytest.mark.parametrize(
    ("architecture", "fields", "says"),
    [
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\]"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
        ("mixtral", {"sliding_window": 8}, "sliding_window=8"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "use_sliding_window=True"),
    ],
)
def test_what_experts_and_windows_cannot_be_here_is_named(tmp_path, architecture, fields, says):
    prefix, own = ARCHITECTURES[architecture]
    getattr(transformers, f"{prefix}Config")(**{**SIZES, **own, **fields}).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedArchitecture, match=says):
        import_hf(tmp_path, device="cpu")


def test_tied_files_with_an_equal_head_and_old_rotary_buffers_are_read(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "in")
    head = tensors(folder)["model.embed_tokens.weight"]
    resave(tmp_path / "in", lambda w: w.update({"lm_head.weight": head}))
    resave(tmp_path / "in", lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    export_hf(import_hf(tmp_path / "in", device="cpu"), tmp_path / "out")
    same(folder, tmp_path / "out")


def test_the_tokenizer_is_carried_along_byte_for_byte(tmp_path):
    source = make_tokenizer(tmp_path / "tokenizer", 40)
    (source / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    (source / "notes.txt").write_text("not ours to copy")
    model = randomise(build_model(LLAMA, seed=0, device="cpu"))
    export_hf(model, tmp_path / "out", tokenizer=source)
    carried = {path.name for path in source.iterdir()} - {"notes.txt"}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= carried
    for name in carried:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes(), name
    assert not (tmp_path / "out" / "notes.txt").exists()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("import sys")["input_ids"]) == "import sys"
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["eos_token_id"] == tokenizer.eos_token_id is not None
    # The next hop takes the ids from the model's own configuration.
    rewrite(tmp_path / "out", eos_token_id=[3, 4])
    export_hf(import_hf(tmp_path / "out", device="cpu"), tmp_path / "again", tokenizer=tmp_path / "out")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["eos_token_id"] == [3, 4]


def test_a_tokenizer_with_more_ids_than_embeddings_is_refused(folder, tmp_path):
    source = make_tokenizer(tmp_path / "tokenizer", 90)
    model = build_model(LLAMA, seed=0, device="cpu")
    with pytest.raises(TokenizerDoesNotFit, match=r"ids up to \d+ and the model embeds 50"):
        export_hf(model, tmp_path / "out", tokenizer=source)
    shutil.copytree(folder, tmp_path / "in")
    shutil.copy(source / "tokenizer.json", tmp_path / "in")
    with pytest.raises(TokenizerDoesNotFit, match="model embeds 62"):
        import_hf(tmp_path / "in", device="cpu")


@pytest.mark.parametrize("content", [None, "{"])
def test_a_tokenizer_that_cannot_be_read_is_refused(tmp_path, content):
    source = tmp_path / "tokenizer"
    source.mkdir()
    if content:
        (source / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerDoesNotFit, match="cannot be read" if content else "neither tokenizer.json nor"):
        export_hf(build_model(LLAMA, seed=0, device="cpu"), tmp_path / "out", tokenizer=source)
    assert not list(tmp_path.glob("*out*"))


def test_nothing_is_overwritten(folder, tmp_path):
    model = build_model(LLAMA, seed=0, device="cpu")
    export_hf(model, tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    with pytest.raises(ExportNotWritten, match="out exists: choose another folder"):
        export_hf(model, tmp_path / "out")
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    model = build_model(LLAMA, seed=0, device="cpu")
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(hf_export.shutil, "disk_usage", lambda path: free._replace(free=1000))
    with pytest.raises(ExportNotWritten, match=r"needs \d+ bytes and 1000 are free"):
        export_hf(model, tmp_path / "out")
    monkeypatch.undo()

    def full(file, data):
        raise OSError(28, "No space left on device")

    for stage in ("shared.megatron.hf_files._write", "shared.megatron.hf_export.write_synced"):
        monkeypatch.setattr(stage, full)
        with pytest.raises(ExportNotWritten, match="No space left on device"):
            export_hf(model, tmp_path / "out")
        assert not list(tmp_path.iterdir())
        monkeypatch.undo()
    export_hf(model, tmp_path / "out")


def killed_at_the_ninth_write(rank: int, path: Path) -> None:
    from shared.megatron import hf_files

    left, write = [9], hf_files._write

    def kill(file, data):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        write(file, data)

    hf_files._write = kill
    export_hf(build_model(LLAMA, seed=0, device="cpu"), path)


def test_a_killed_export_never_looks_complete_and_the_next_one_succeeds(tmp_path):
    with pytest.raises(RuntimeError, match="died without an answer"):
        run_ranks(killed_at_the_ninth_write, Layout(), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    model = build_model(LLAMA, seed=0, device="cpu")
    export_hf(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]
    import_hf(tmp_path / "out", device="cpu")


def test_two_exports_to_one_folder_do_not_mix(tmp_path):
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    descriptor = os.open(partial, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(ExportNotWritten, match="another process is exporting"):
            export_hf(build_model(LLAMA, seed=0, device="cpu"), tmp_path / "out")
    finally:
        os.close(descriptor)
