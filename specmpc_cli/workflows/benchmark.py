"""The benchmark: our path beside a plain one (learning/plain.py), interleaved in one process, with the arithmetic floor.

Weights are random: speed does not depend on them. Dimensions are walker-walk's (24 observations, 6 actions), settings the published ones.
"""

from __future__ import annotations

import copy
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from specmpc_cli.config.schema import CorrectorConfig, PlannerConfig, TrainConfig
from specmpc_cli.engine import native
from specmpc_cli.engine.batched_planner import BatchedPlanner
from specmpc_cli.engine.captured import CapturedCall
from specmpc_cli.engine.compiled import draws_for, judge_for
from specmpc_cli.engine.correctors import CORRECTORS, CorrectorDims, build_corrector, packed
from specmpc_cli.engine.gate import GateRule
from specmpc_cli.engine.layers import Mlp
from specmpc_cli.engine.planner import EAGER
from specmpc_cli.engine.runner import SpeculativeRunner
from specmpc_cli.engine.world_model import MODEL_SIZES, WorldModel, WorldModelDims
from specmpc_cli.envs.registry import lookup
from specmpc_cli.errors import ConfigError
from specmpc_cli.learning.learner import Learner, LearnerSettings
from specmpc_cli.learning.losses import Batch, LossSettings
from specmpc_cli.learning.plain import PlainLearner, PlainModel, plain_plan
from specmpc_cli.runtime import DTYPE_NAMES, Runtime, Stopwatch
from specmpc_cli.versions import versions
from specmpc_cli.workflows.acting import COMPILER_ERRORS, compilers_fault, make_planner
from specmpc_cli.workflows.store import timestamp

WHAT = ("plan", "batch", "update", "step")
DEFAULT_SIZES = (1, 5)
TASK = "walker-walk"
_WARM_UP = 3  # runs of each path that are not counted
_SECONDS = 6.0  # of counted runs per row, but no fewer than _FEWEST of each path and no more than about _MOST
_FEWEST, _MOST = 5, 300
_TURN_MS = 10.0  # of our runs, at least one: short ones that alternated singly would each find the other's weights in the caches
_CPU_BATCH, _CUDA_BATCH = 4, 64
PEAK_SIZE = {"cpu": 2048, "cuda": 8192}  # of the square product that tells the device's speed
_HORIZON = 6  # env steps per plan of the timed step, which is of age 1


def parse_sizes(text: str) -> list[int]:
    """`1,5` → sizes in millions of parameters. Raises ConfigError."""
    known = ", ".join(map(str, MODEL_SIZES))
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--sizes takes sizes separated by commas, such as 1,5; got {text!r}") from None
    for size in sizes:
        if size not in MODEL_SIZES:
            raise ConfigError(f"--sizes must be among {known}, got {size}")
    return list(dict.fromkeys(sizes))


def parse_what(text: str) -> list[str]:
    """`plan,update` → what to time. Raises ConfigError."""
    asked = [part.strip() for part in text.split(",")]
    for one in asked:
        if one not in WHAT:
            raise ConfigError(f"--what must be among {', '.join(WHAT)}, got {one!r}")
    return list(dict.fromkeys(asked))


def benchmark(
    runtime: Runtime,
    sizes: Sequence[int] = DEFAULT_SIZES,
    what: Sequence[str] = WHAT,
    *,
    seconds: float | None = None,
    on_prepare: Callable[[int], None] | None = None,
    on_row: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Times each of `what` for each size; → the report of docs/json.md.

    Args:
        seconds: how long a row's counted runs take, both paths together; 6 if left out.
        on_prepare: told a size before its kernels are compiled.
        on_row: told each row as it is measured, before its floor is known.
    """
    peaks: dict[torch.dtype, float] = {}  # the highest so far
    notes, rows = [], []
    for size in sizes:
        if on_prepare:
            on_prepare(size)
        subject = Subject(size, runtime)
        cases, problem = subject.prepare(what)
        if problem:
            runtime = subject.runtime
            notes = list(dict.fromkeys([*notes, problem]))
        for case in cases:
            for dtype in {runtime.planning_dtype, _dtype_of(case.what, runtime)}:  # before each row, because clocks waver
                peaks[dtype] = max(peaks.get(dtype, 0.0), peak_gflops(runtime, dtype))
            row = measure(case, runtime, _SECONDS if seconds is None else seconds)
            rows.append(row)
            if on_row:
                on_row(row)
    for row in rows:
        dtype = _dtype_of(row["what"], runtime)
        row |= {"dtype": DTYPE_NAMES[dtype], "floor_ms": row["gflop"] / peaks[dtype] * 1e3}
    return {
        "schema": 1,
        "device": runtime.device.type,
        "machine": machine_name(runtime.device),
        "dtype": runtime.dtype_name,
        "compiled": runtime.compiled,
        "threads": runtime.threads,
        "peak_gflops": peaks[runtime.planning_dtype],
        "versions": versions(),
        "date": timestamp(),
        "notes": notes,
        "rows": rows,
    }


@dataclass(frozen=True, slots=True)
class Case:
    """One row: the same work done by both paths."""

    what: str
    size: int
    batch: int
    ours: Callable[[], object]
    plain: Callable[[], object]
    work: Callable[[], object]  # the products of ours, eagerly, for counting them


class Subject:
    """A world model of one size with everything that is timed."""

    def __init__(self, size: int, runtime: Runtime) -> None:
        self.size, self.runtime = size, runtime
        self._spec = lookup(TASK).spec
        torch.manual_seed(0)
        dims = WorldModelDims(self._spec.obs_dim, self._spec.action_dim, episodic=self._spec.episodic, **MODEL_SIZES[size])
        self.model = WorldModel(dims).to(runtime.device).requires_grad_(False)
        self._obs = torch.randn(1, dims.obs_dim, device=runtime.device)
        self._planner = make_planner(self.model, PlannerConfig(), self._spec, runtime)

    @cached_property
    def _plain(self) -> PlainModel:
        return PlainModel(self.model).to(self.runtime.device).requires_grad_(False).eval()

    @cached_property
    def _learner(self) -> Learner:
        return self._make_learner(self.runtime, LearnerSettings().dropout)

    def _make_learner(self, runtime: Runtime, dropout: float) -> Learner:
        return Learner(copy.deepcopy(self.model), self._losses, LearnerSettings(dropout=dropout), runtime, seed=0)

    @cached_property
    def _losses(self) -> LossSettings:
        return LossSettings(self._spec.discount)

    @cached_property
    def _plain_learner(self) -> PlainLearner:
        settings = LearnerSettings()
        return PlainLearner(PlainModel(self.model, settings.dropout).to(self.runtime.device), self._losses, settings)

    @cached_property
    def _batch(self) -> Batch:
        d, train = self.model.dims, TrainConfig()
        device, shape = self.runtime.device, (train.horizon, train.batch_size)
        obs = torch.randn(train.horizon + 1, train.batch_size, d.obs_dim, device=device)
        action = torch.rand(*shape, d.action_dim, device=device) * 2 - 1
        return Batch(obs, action, torch.randn(shape, device=device), torch.zeros(shape, device=device))

    def prepare(self, what: Sequence[str]) -> tuple[list[Case], str | None]:
        """The rows of this size, our path of each run once, which compiles what will be compiled; and what went wrong, if that fails."""
        try:
            cases = self._cases(what)
            for case in cases:
                case.ours()
        except COMPILER_ERRORS as error:
            reason = compilers_fault(error, self.runtime)
            self.runtime = replace(self.runtime, compiled=False)
            self._planner = make_planner(self.model, PlannerConfig(), self._spec, self.runtime)
            self.__dict__.pop("_learner", None)
            problem = f"compiling failed, so our path is timed eagerly: {reason}"
            return self._cases(what), problem
        return cases, native.problem()

    def _cases(self, what: Sequence[str]) -> list[Case]:
        """In the order of WHAT."""
        makers = {"plan": self._plan_case, "batch": self._batch_case, "update": self._update_case, "step": self._step_case}
        return [makers[one]() for one in WHAT if one in what]

    def _plan_case(self) -> Case:
        return self._planning("plan", 1)

    def _batch_case(self) -> Case:
        return self._planning("batch", _CUDA_BATCH if self.runtime.device.type == "cuda" else _CPU_BATCH)

    def _planning(self, what: str, rows: int) -> Case:
        """Plans from observations, draws included; the plain path plans one environment after the other."""
        settings = self._planner.settings
        previous = torch.zeros(settings.horizon, self.model.dims.action_dim, device=self.runtime.device)
        warm_start = previous.expand(rows, -1, -1).contiguous()
        index, obs = torch.arange(rows, device=self.runtime.device), self._obs.expand(rows, -1).contiguous()
        eager = BatchedPlanner(
            self.model,
            settings,
            dtype=self.runtime.dtype,
            kernels=EAGER,
            batch_sizes=(1, rows) if rows > 1 else (1,),
            draws=draws_for(replace(self.runtime, compiled=False)),  # the compiler refuses to work while products are counted
        )

        encode = CapturedCall(self._planner.networks.encode, self.runtime.device)  # a runner has it in its judgement's graph

        @torch.inference_mode()
        def planned_by(planner: BatchedPlanner, encode: Callable[[Tensor], Tensor]) -> None:
            planner(encode(obs), warm_start, index, index)

        def plain() -> None:
            for row in range(rows):
                plain_plan(self._plain, self._obs, previous, eager.draw(index[row : row + 1], index[row : row + 1]), settings)

        return Case(what, self.size, rows, lambda: planned_by(self._planner, encode), plain, lambda: planned_by(eager, self.model.encode))

    def _update_case(self) -> Case:
        horizon, size = self._batch.reward.shape
        eager = self._make_learner(replace(self.runtime, compiled=False), dropout=0.0)  # the plain model drops features itself

        def plain() -> None:
            self._plain_learner.step(self._batch, eager.draw(horizon, size))

        return Case("update", self.size, size, lambda: self._learner.update(self._batch), plain, lambda: eager.rehearse(size, horizon))

    def _step_case(self) -> Case:
        """A step that executes its plan: observation in, corrected action out; on the plain path by torch's functions alone."""
        d, config = self.model.dims, CorrectorConfig()
        dims = CorrectorDims(d.latent_dim, d.action_dim, config.width, config.history, config.layers)
        torch.manual_seed(0)
        network = build_corrector(next(iter(CORRECTORS)), dims).to(self.runtime.device).requires_grad_(False).eval()
        fast = packed(network) if native.serves(self.runtime, torch.float32) else network
        runner = partial(SpeculativeRunner, self.model, self._planner, GateRule(_HORIZON), history=config.history)
        ours = runner(fast, judge=judge_for(self.runtime.device), behaviour=self._planner.networks)
        plain = runner(network)
        first = torch.ones(1, dtype=torch.bool, device=self.runtime.device)
        _, state, _ = plain.act(self._obs, plain.initial_state(1), first)
        later = torch.zeros_like(first)
        return Case(
            "step",
            self.size,
            1,
            lambda: ours.act(self._obs, state, later),
            lambda: plain.act(self._obs, state, later),
            lambda: plain.act(self._obs, state, later),
        )


def measure(case: Case, runtime: Runtime, seconds: float) -> dict[str, Any]:
    """A row of the report but for its floor: medians of runs in turns, warm-up left out."""
    watch = Stopwatch(runtime.device)

    def timed(run: Callable[[], object], count: int) -> list[float]:
        times = []
        for _ in range(count):
            watch.start()
            run()
            times.append(watch.stop_ms())
        return times

    timed(case.plain, _WARM_UP)
    turn = max(1, min(round(_TURN_MS / min(timed(case.ours, _WARM_UP))), _MOST))
    ours_ms: list[float] = []
    plain_ms: list[float] = []
    while len(ours_ms) < _FEWEST or (sum(ours_ms) + sum(plain_ms) < seconds * 1e3 and len(ours_ms) < _MOST):
        ours_ms += timed(case.ours, turn)
        plain_ms += timed(case.plain, turn)
    with FlopCounterMode(display=False) as counter:
        case.work()
    gflop = counter.get_total_flops() / 1e9
    ours, plain = statistics.median(ours_ms), statistics.median(plain_ms)
    return {
        "what": case.what,
        "size": case.size,
        "batch": case.batch,
        "ours_ms": ours,
        "plain_ms": plain,
        "ratio": plain / ours,
        "gflop": gflop,
        "pairs": len(ours_ms),
        "compiled": runtime.compiled,
    }


def _dtype_of(what: str, runtime: Runtime) -> torch.dtype:
    """Of a row's products: a controller's step is computed in fp32, and 8 bits are the planner's."""
    return {"step": torch.float32, "update": runtime.dtype}.get(what, runtime.planning_dtype)


@torch.inference_mode()
def peak_gflops(runtime: Runtime, dtype: torch.dtype) -> float:
    """GFLOP/s of a large matrix product, torch's or our own, whichever is faster: what arithmetic alone could reach here now."""
    device, size = runtime.device, PEAK_SIZE[runtime.device.type]
    given, rates = torch.randn(size, size, device=device), []
    if dtype is torch.int8:
        native.require_int8()
    else:
        a = given.to(dtype)
        rates.append(_gflops(lambda: torch.mm(a, a), size**3, device))
    if native.serves(runtime, dtype):
        width = size // 4  # a layer's
        int8 = dtype is torch.int8
        layer = Mlp(width, [], width).to(torch.float32 if int8 else dtype)
        layer.pack(int8)
        rows = given[:, :width].contiguous()
        rates.append(_gflops(lambda: layer(rows), size * width**2, device))
    return max(rates)


def _gflops(product: Callable[[], Tensor], multiplications: int, device: torch.device) -> float:
    """GFLOP/s of the fastest of a few runs."""
    watch, times = Stopwatch(device), []
    for _ in range(7):
        watch.start()
        product()
        times.append(watch.stop_ms())
    return 2 * multiplications / 1e6 / min(times[2:])


def machine_name(device: torch.device) -> str:
    """The processor's or the GPU's name, as the system gives it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
