"""pass@k without bias: the chance that at least one of k of the n samples drawn is correct.

pass_at_k(n=8, c=2, k=4)
"""

from __future__ import annotations

from math import comb


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): unbiased for the pass@k of a problem from `c` correct among `n` samples.

    Chen et al. 2021 (arXiv 2107.03374), section 2.1. Raises `ValueError` unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    return 1.0 - comb(n - c, k) / comb(n, k)
