"""What is compiled, and when. The eager path is the same code: these are the planner's own two functions, compiled.

One MPPI iteration is the unit (not the unrolled plan): it compiles once per batch size in well under a minute, and Inductor's on-disk cache
(runtime.use_compile_cache) makes the next start take seconds.
"""

from __future__ import annotations

from functools import cache

import torch

from specmpc_cli.engine.planner import EAGER, Kernels, iterate, prior_actions
from specmpc_cli.runtime import Runtime, use_compile_cache

# Every size compiles once. A CPU is filled by one plan; a GPU wants many rows.
CPU_BATCH_SIZES = (1,)
CUDA_BATCH_SIZES = (1, 4, 16, 64)


@cache
def compiled_kernels() -> Kernels:
    """The compiled kernels; compilation itself happens at their first call with a new shape."""
    use_compile_cache()
    # Models of other sizes in one process are no reason to give up: each is compiled for its own shapes.
    torch._dynamo.config.recompile_limit = 256
    return Kernels(
        torch.compile(prior_actions, fullgraph=True, dynamic=False),
        torch.compile(iterate, fullgraph=True, dynamic=False),
    )


def kernels_for(runtime: Runtime) -> Kernels:
    """Compiled or eager kernels, as the runtime was chosen."""
    return compiled_kernels() if runtime.compiled else EAGER


def batch_sizes_for(runtime: Runtime) -> tuple[int, ...]:
    """The row counts in which this device plans best."""
    return CUDA_BATCH_SIZES if runtime.device.type == "cuda" else CPU_BATCH_SIZES
