"""Peak speeds of GPUs, for the MFU. A GPU that is not listed has none, and its MFU is null.

Dense bfloat16 on tensor cores with float32 accumulation. From NVIDIA's data sheets (half of the number where a sheet
states it with sparsity), and for RTX 4090 and 3090 from the white papers of the Ada and GA102 architectures.
"""

from __future__ import annotations

import re

# Whole name as CUDA gives it, without "NVIDIA" -> TFLOP/s. Laptop, MIG and export variants are other names.
PEAKS: dict[str, float] = {
    r"H200": 989,
    r"H100 80GB HBM3": 989,  # SXM
    r"H100 PCIe": 756,
    r"A100-(SXM4|PCIE)-[48]0GB|A100 80GB PCIe": 312,
    r"A40": 149.7,
    r"A30": 165,
    r"A10": 125,
    r"L40S": 362,
    r"L4": 121,
    r"GeForce RTX 4090": 165.2,
    r"GeForce RTX 3090": 71,
}


def peak_tflops(device: str) -> float | None:
    """TFLOP/s of the GPU that CUDA calls `device`, None if it is not in the table."""
    name = device.removeprefix("NVIDIA ")
    return next((peak for pattern, peak in PEAKS.items() if re.fullmatch(pattern, name)), None)
