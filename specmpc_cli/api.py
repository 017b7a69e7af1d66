"""For a loop of your own: a robot, another simulator, a web service.

    controller = specmpc_cli.api.load_controller("walker-walk", mode="corrected", horizon=6)
    controller.reset()
    action = controller.act(obs)

The controller runs the same engine as the commands; it keeps one episode's state for you.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from specmpc_cli.config.presets import check_sections
from specmpc_cli.config.schema import ACTING_SECTIONS
from specmpc_cli.envs.registry import is_task, lookup
from specmpc_cli.errors import ConfigError
from specmpc_cli.runtime import Purpose, choose_runtime, stream_key
from specmpc_cli.types import StepLog
from specmpc_cli.workflows.acting import Workbench
from specmpc_cli.workflows.store import Store, config_of
from specmpc_cli.workflows.ways import Way, broken_promise, choose_way


class Controller:
    """One environment's controller. `act` takes and returns plain arrays; `log` tells what the last step did."""

    def __init__(self, bench: Workbench, way: Way, seed: int = 0) -> None:
        self.bench, self.way = bench, way
        self.log: StepLog | None = None  # of the last step, batch of one: decision, age, mismatch, ...
        self._actor = bench.actor(way)
        self._seed = seed
        self._episode = 0
        self._first = True
        self.reset()

    def reset(self) -> None:
        """The next `act` begins an episode: it plans afresh and remembers nothing of the last one.

        Episode e of a controller draws what episode e of `eval` with the same seed draws.
        """
        self._episode += not self._first  # an episode that has not begun is still the same
        stream = stream_key(Purpose.COMPARE, self._seed, self._episode)
        row = torch.zeros(1, dtype=torch.int64, device=self.bench.runtime.device)
        self._state = self._actor.begin(self._actor.initial_state(1), row, row + stream)
        self._first = True

    def act(self, obs: np.ndarray) -> np.ndarray:
        """Observation [O] as the task's environment gives it → action [A] in [-1, 1].

        Raises:
            ConfigError: an observation of another shape, or one that is not finite.
        """
        flat = np.asarray(obs, dtype=np.float32).ravel()
        expected = self.bench.model.dims.obs_dim
        if flat.shape != (expected,):
            raise ConfigError(f"expected an observation of {expected} values, got {flat.shape[0]}")
        if not np.isfinite(flat).all():
            raise ConfigError("the observation holds values that are not finite; check the sensor that gave them")
        device = self.bench.runtime.device
        batch = torch.from_numpy(flat).to(device).unsqueeze(0)
        first = torch.tensor([self._first], device=device)
        action, self._state, self.log = self._actor.act(batch, self._state, first)
        self._first = False
        return action[0].cpu().numpy()


def load_controller(
    task_or_path: str | Path,
    mode: str = "corrected",
    *,
    horizon: int | None = None,
    arch: str | None = None,
    store: str | Path | None = None,
    name: str = "main",
    device: str = "auto",
    dtype: str = "auto",
    accept_below: float | None = None,
    replan_above: float | None = None,
    settings: Sequence[str] = (),
    seed: int = 0,
) -> Controller:
    """A controller for your own loop. Compiles what will act before it returns, so that no step waits for it.

    Args:
        task_or_path: a task's name (its teacher in the store, else the embedded one), or a store folder `<store>/<task>/<name>`.
        mode: baseline, policy, naive, corrected, adaptive or distilled.
        horizon: env steps per plan for naive and corrected, 6 if left out.
        arch: two-tower, temporal or distilled; for corrected and adaptive, the first one that fits the teacher if left out.
        store: the folder of teachers and correctors; SPECMPC_STORE, else ./specmpc-store, if left out.
        accept_below, replan_above: thresholds of a gate by hand, instead of the one that the corrector carries or lacks.
        settings: what `--set` takes on the command line, such as `refine.iterations=2`.

    Raises:
        SpecMPCError: the same errors as the commands, with their remedies.
    """
    place = _place(task_or_path, Path(store or os.environ.get("SPECMPC_STORE") or "specmpc-store"), name)
    check_sections(settings, ACTING_SECTIONS, "acting")
    teacher = place.teacher()
    bench = Workbench(teacher, lookup(place.task).spec, config_of(teacher, [], list(settings)), choose_runtime(device, dtype))
    way = choose_way(
        place, bench.teacher, bench.config, mode, horizon=horizon, arch=arch, accept_below=accept_below, replan_above=replan_above
    )
    problems = [
        broken_promise(way, bench.config, bench.runtime.dtype_name),
        bench.warm_up([way], rows=1),
    ]
    for problem in filter(None, problems):
        warnings.warn(problem, stacklevel=2)
    return Controller(bench, way, seed)


def _place(task_or_path: str | Path, store: Path, name: str) -> Store:
    """A task of `store`, or the task of a folder `<store>/<task>/<name>`."""
    folder = Path(task_or_path).resolve()
    if folder.is_dir() and is_task(folder.parent.name):
        return Store(folder.parents[1], folder.parent.name, folder.name)
    return Store(store, str(task_or_path), name)
