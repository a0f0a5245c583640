"""Check that everything proven on CPUs holds on this machine's GPUs, and measure speed.

    nox -s gpu-check                            # or: python -m shared.gpucheck
    python -m shared.gpucheck --device cpu      # a dry run of the checks themselves, CPU against CPU

The result goes to results/gpu-check/<gpu>.json, to be committed; a dry run writes nothing. Exit code 0 if nothing
failed, 1 if something did, 2 without a GPU. Not run on a GPU yet; docs/gpu.md says what each check means.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.gpucheck", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run, nothing is written")
    device = parser.parse_args(arguments).device
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print("PyTorch sees no GPU: run this on a machine with one, or add --device cpu for a dry run.")
            return 2
    from shared.gpucheck import record
    from shared.gpucheck.checks import run_checks
    from shared.gpucheck.sizes import DRY, GPU

    result = run_checks(device, GPU if device == "cuda" else DRY)
    if device == "cuda":
        print(f"written: {record.write(result, ROOT).relative_to(ROOT)}; commit it, then run `nox -s tables`")
    return int(any(check["status"] == "fail" for check in result["checks"]))


if __name__ == "__main__":
    sys.exit(main())
