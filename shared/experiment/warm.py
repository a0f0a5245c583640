"""Preloaded last by the process pool: what torch imports late, once for all children instead of once in each.

The first step of a torch optimiser imports torch._dynamo, about 0.85 CPU-seconds where no byte code is cached.
"""

import sys

if "torch" in sys.modules:
    import torch._dynamo  # noqa: F401
