"""What is compiled, and when. The eager path is the same code: these are the engine's own functions, compiled.

One MPPI iteration is the unit (not the unrolled plan): it compiles once per batch size in well under a minute, and Inductor's on-disk cache
(runtime.use_compile_cache) makes the next start take seconds. On a CPU packed models have kernels of our own instead (packed_planner.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from specmpc_cli.engine import packed_planner, planner
from specmpc_cli.engine.captured import CapturedCall
from specmpc_cli.engine.draws import Draws, block_numbers, device_draws, draws_from, host_draws, kernel_draws
from specmpc_cli.engine.gate import GateLimits
from specmpc_cli.engine.planner import EAGER, Behaviour, Dynamics, Kernels, PlannerNoise, PlannerSettings, Rollouts, Search
from specmpc_cli.engine.rows import row_by_row
from specmpc_cli.engine.runner import Judge, Judgement, judge
from specmpc_cli.engine.world_model import WorldModel
from specmpc_cli.runtime import Runtime
from specmpc_cli.types import Corrector

_Function = TypeVar("_Function", bound=Callable[..., Any])

# Every size compiles once. A CPU is filled by one plan; a GPU wants many rows.
CPU_BATCH_SIZES = (1,)
CUDA_BATCH_SIZES = (1, 4, 16, 64)


def compiled(fn: _Function) -> _Function:
    """The function, compiled at its first call for each new shape and model, once for all who ask for it."""

    @wraps(fn)
    def call(*given: Any, **named: Any) -> Any:
        return _compiled(fn)(*given, **named)

    return cast(_Function, call)


@cache
def _compiled(fn: _Function) -> _Function:
    # Not before the first call: their import takes more than a second, and a CPU that has kernels of our own needs none of it.
    from torch import _dynamo as dynamo
    from torch._inductor import config as inductor

    # Models of other sizes in one process are no reason to give up: each is compiled for its own shapes.
    dynamo.config.recompile_limit = 256
    # On a GPU sizes that its matrix units dislike are padded always, instead of after half a minute of trying both.
    inductor.force_shape_pad = True
    return cast(_Function, torch.compile(fn, fullgraph=True, dynamic=False))


def compiled_kernels() -> Kernels:
    """The fastest there are: our own for a packed model, else compiled ones; those are compiled at their first call with a new shape."""
    compiled_rollouts, compiled_iterate, compiled_select = (
        compiled(planner.prior_rollouts),
        compiled(planner.iterate),
        compiled(planner.select),
    )

    def prior_rollouts(model: WorldModel, *given: Any) -> Rollouts:
        return (packed_planner.prior_rollouts if model.packed else compiled_rollouts)(model, *given)

    def iterate(model: WorldModel, *given: Any) -> Search:
        return (packed_planner.iterate if model.packed else compiled_iterate)(model, *given)

    def select(dynamics: Dynamics, z: Tensor, *found: Any) -> tuple[Tensor, ...]:
        # A CPU would gain less than its longer start costs; on a GPU these are dozens of kernels.
        return (compiled_select if z.is_cuda else planner.select)(dynamics, z, *found)

    return Kernels(prior_rollouts, iterate, select, packed=True)


def captured_judge() -> Judge:
    """The judgement of all rows as one CUDA graph for each number of rows: a hundred small operations are not launched one by one.

    It keeps the models, correctors and graphs that it has met.
    """
    calls: dict[tuple[Behaviour, Corrector | None, str, int], CapturedCall] = {}

    @torch.inference_mode()
    def judge_rows(model: Behaviour, corrector: Corrector | None, metric: str, limits: GateLimits, *seen: Tensor) -> Judgement:
        key = (model, corrector, metric, len(seen[0]))
        if key not in calls:

            def judged(*given: Tensor) -> Judgement:
                return judge(model, corrector, metric, GateLimits(*given[: len(limits)]), *given[len(limits) :])

            calls[key] = CapturedCall(judged, seen[0].device)
        return calls[key](*limits, *seen)  # limits are data to the graph: rules may differ

    return judge_rows


def judge_for(device: torch.device) -> Judge:
    """How this device judges: a CPU row by row, CUDA all rows at once, captured."""
    return captured_judge() if device.type == "cuda" else judge_row_by_row


def judge_row_by_row(model: Behaviour, corrector: Corrector | None, metric: str, limits: GateLimits, *seen: Tensor) -> Judgement:
    """`judge` of each row alone, so that it does not depend on those beside it."""
    return row_by_row(lambda *row: judge(model, corrector, metric, limits, *row), *seen)


def kernels_for(runtime: Runtime) -> Kernels:
    """Compiled or eager kernels, as the runtime was chosen."""
    return compiled_kernels() if runtime.compiled else EAGER


def draws_for(runtime: Runtime) -> Draws:
    """Where this device's planners draw: on the host for a CPU, on the device, in two kernels if compiled, for CUDA."""
    if runtime.device.type != "cuda":
        return kernel_draws if runtime.compiled else host_draws
    return compiled_draws() if runtime.compiled else device_draws


def compiled_draws() -> Draws:
    """The device's draws, compiled."""
    from_blocks = compiled(draws_from)

    def draws(s: PlannerSettings, action_dim: int, num_q: int, streams: Tensor, steps: Tensor) -> PlannerNoise:
        return from_blocks(s, action_dim, num_q, streams, steps, block_numbers(s, action_dim, streams.device))

    return draws


def batch_sizes_for(runtime: Runtime) -> tuple[int, ...]:
    """The row counts in which this device plans best."""
    return CUDA_BATCH_SIZES if runtime.device.type == "cuda" else CPU_BATCH_SIZES
