"""Where data sets come from and where they lie: `resolve("math/gsm8k_test")` gives the path of a checked file.

Places, in this order: the folder in the environment variable ASSAY_DATA, `../shared/data` beside the checkout, and
`assay/data` in the user's cache ($XDG_CACHE_HOME, else ~/.cache). Files are never part of the project.

    python -m shared.data list
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from shared.experiment.contracts import AssayError


@dataclass(frozen=True)
class Entry:
    """One file. `path` is relative to a data folder; `origin` reads repository@commit: path."""

    name: str
    path: str
    origin: str
    licence: str
    sha256: str


class UnknownData(AssayError):
    """The catalog has no set of this name."""


class DataMissing(AssayError):
    """The set is in none of the data folders."""


class DataDamaged(AssayError):
    """The file is there but is not the one the catalog describes."""


CATALOG = {
    entry.name: entry
    for entry in (
        Entry(
            "math/aime24",
            "math/aime24.jsonl",
            "QwenLM/Qwen2.5-Math@a45202bd16f1: evaluation/data/aime24/test.jsonl",
            "problem text © MAA, widely redistributed for evaluation; repository licence MIT",
            "4dfb61f65de1cb9c2924c36687c1bfb41c46dedf91e143f39c6f3e6d13845645",
        ),
        Entry(
            "math/aime25",
            "math/aime25.jsonl",
            "Kwai-Klear/KlearReasoner@3422f6d36a82: benchmarks/aime25.qs.jsonl",
            "problem text © MAA, widely redistributed for evaluation; repository licence Apache-2.0",
            "6d1162e03fb45e9398dcb5fa3935cb1d7412ba1b7f253b039873c37234764574",
        ),
        Entry(
            "math/aime_1983_2023",
            "math/aime_1983_2023.jsonl.gz",
            "agentica-project/rllm@874daa4acb7f: rllm/data/train/math/aime.json",
            "problem text © MAA, widely redistributed for evaluation; repository licence MIT",
            "fec6b9e81515917815ae0b2e73d346258afc8f8db7da2263d04f3cac90330aa7",
        ),
        Entry(
            "math/amc23",
            "math/amc23.jsonl",
            "QwenLM/Qwen2.5-Math@a45202bd16f1: evaluation/data/amc23/test.jsonl",
            "problem text © MAA, widely redistributed for evaluation; repository licence MIT",
            "bb414656e438ee7e1126475c8779df1fe3bfbe61f24046b0ef9645233ddac18c",
        ),
        Entry(
            "math/deepscaler_levels",
            "math/deepscaler_levels.jsonl.gz",
            "ruixin31/Spurious_Rewards@33b9f85d5b09: code/data/DeepScaleR_Difficulty_Level_{1..5}/train.json",
            "MIT (DeepScaleR-Preview data set)",
            "4b5b075df8a8193b0607aa1cc7c1208fd9435455355793be9685a496d54da930",
        ),
        Entry(
            "math/dsr_sub_1209",
            "math/dsr_sub_1209.jsonl.gz",
            "ypwang61/One-Shot-RLVR@21ed529ec900: data/train/one_shot_rlvr/dsr_sub.parquet",
            "Apache-2.0",
            "37e3ec902563e0199f87d59378adaa491b0ef2b7ae88e81076f9a985de008987",
        ),
        Entry(
            "math/gsm8k_test",
            "math/gsm8k_test.jsonl.gz",
            "openai/grade-school-math@3101c7d50724: grade_school_math/data/test.jsonl",
            "MIT",
            "9151aaa03bf988249809bae758cc73d23d385d10feade92d067d890e25cd5123",
        ),
        Entry(
            "math/gsm8k_train",
            "math/gsm8k_train.jsonl.gz",
            "openai/grade-school-math@3101c7d50724: grade_school_math/data/train.jsonl",
            "MIT",
            "375e3c071a28ad4c166a8e00cfb3aaf1f10ee463a805d7bd68e99f8aea0b5677",
        ),
        Entry(
            "math/hmmt_feb_2024",
            "math/hmmt_feb_2024.jsonl",
            "eth-sri/matharena@96440b20d0b9: data/hmmt/hmmt_feb_2024/",
            "MIT repository; problems © HMMT",
            "1956d8a1866164b721523bdd2591a70549e32b90c4378f07a2a5fb3bdc251c94",
        ),
        Entry(
            "math/math500",
            "math/math500.jsonl.gz",
            "hkust-nlp/simpleRL-reason@cf1c7858bfc1: examples/simplelr_math_eval/data/math500/test.jsonl",
            "MIT (MATH, Hendrycks et al.)",
            "f07ed38613fb7897a59423a841d8ab2bb288eba639fbf3ecf1ff3e2bc9c76419",
        ),
        Entry(
            "math/math8k_limr",
            "math/math8k_limr.jsonl.gz",
            "GAIR-NLP/LIMR@98ebf1bd54cc: data/prompts/math.8k.json; GAIR-NLP/LIMR@98ebf1bd54cc: data/scores.json",
            "repository states none; problems from MATH (MIT)",
            "3037edda49ac88efe57eb08932a98a5020cd86febdcd00bfed65edb169389c2f",
        ),
        Entry(
            "math/math_test_minus500",
            "math/math_test_minus500.jsonl.gz",
            "ZhiYuanZeng/test-time-scaling-eval@130bf5bb8649: data/math/*_test.jsonl",
            "MIT (MATH, Hendrycks et al.)",
            "f1a21cd7ca548374115e9eafb39943705ea98c31cde490ee16e7bbb7b430403f",
        ),
        Entry(
            "math/math_train",
            "math/math_train.jsonl.gz",
            "agentica-project/rllm@874daa4acb7f: rllm/data/train/math/math.json",
            "MIT (MATH, Hendrycks et al.)",
            "7b59d2e269db189d0d06a71de964df8f1702edc00c373ba66d1a69f5f4c7c3e6",
        ),
        Entry(
            "math/mawps",
            "math/mawps.jsonl.gz",
            "QwenLM/Qwen2.5-Math@a45202bd16f1: evaluation/data/mawps/test.jsonl",
            "MIT",
            "8e68feccca1af9d366ca5156022eeedc3f7968a36ce63d3f351eb2cca75d77db",
        ),
        Entry(
            "math/minerva_math",
            "math/minerva_math.jsonl.gz",
            "QwenLM/Qwen2.5-Math@a45202bd16f1: evaluation/data/minerva_math/test.jsonl",
            "MIT repository; MIT OpenCourseWare course material (CC BY-NC-SA 4.0)",
            "a1466a357a6c7521f458a499470422dc9e6b1d80fdfba492fbd94af75209495f",
        ),
        Entry(
            "math/olympiadbench_en",
            "math/olympiadbench_en.jsonl.gz",
            "QwenLM/Qwen2.5-Math@a45202bd16f1: evaluation/data/olympiadbench/test.jsonl",
            "Apache-2.0 (OlympiadBench)",
            "b6578c7211bc5e1673420d4a704374a8ebeaeafbc3e79334545ea32a0b8baadb",
        ),
        Entry(
            "math/svamp",
            "math/svamp.jsonl.gz",
            "QwenLM/Qwen2.5-Math@a45202bd16f1: evaluation/data/svamp/test.jsonl",
            "MIT",
            "a2869a8bc38028a5f976a673458a5b0b2caeab6d8d512ba2e4fd0a41011cbf48",
        ),
    )
}


def folders() -> list[Path]:
    """Data folders in the order they are searched."""
    chosen = os.environ.get("ASSAY_DATA")
    cache_home = os.environ.get("XDG_CACHE_HOME")
    return [
        *([Path(chosen).expanduser()] if chosen else []),
        Path(__file__).resolve().parents[2].parent / "shared" / "data",
        (Path(cache_home) if cache_home else Path.home() / ".cache") / "assay" / "data",
    ]


def find(entry: Entry) -> Path | None:
    """First place where the file exists, unchecked."""
    return next((path for folder in folders() if (path := folder / entry.path).is_file()), None)


def resolve(name: str) -> Path:
    """Path of a set, its SHA-256 verified once per process.

    Raises `UnknownData`, `DataMissing` (with origin, licence and what to do) or `DataDamaged`.
    """
    if name not in CATALOG:
        close = get_close_matches(name, CATALOG, n=1, cutoff=0.0)[0]
        raise UnknownData(f"Unknown data set {name!r}: did you mean {close!r}? `python -m shared.data list` names all.")
    entry = CATALOG[name]
    path = find(entry)
    if path is None:
        raise DataMissing(
            f"Data set {name!r} is not here (origin: {entry.origin}; licence: {entry.licence}): "
            f"put it at {folders()[-1] / entry.path}, or set ASSAY_DATA to a folder that holds {entry.path}."
        )
    found = _sha256(path)
    if found != entry.sha256:
        raise DataDamaged(
            f"{path} is not the file of the catalog (SHA-256 {found[:16]}..., expected {entry.sha256[:16]}...): "
            f"replace it from its origin, {entry.origin}."
        )
    return path


@cache
def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
