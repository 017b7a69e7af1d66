"""The planner as the runner calls it: any number of rows, with the random draws of each row's own stream.

Draws are keyed by (stream, step), so a row's plan does not depend on which other rows are planned beside it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from specmpc_cli.engine.planner import EAGER, Kernels, PlannerNoise, PlannerSettings, plan
from specmpc_cli.engine.world_model import WorldModel
from specmpc_cli.types import Plan


class BatchedPlanner:
    """Plans rows in a few fixed batch sizes, so that few shapes are compiled.

    On a CPU one plan's 512 candidates already fill the cores, so rows are planned one at a time there: the same speed, and results
    are equal to the last bit whatever shares the batch.
    """

    def __init__(
        self,
        model: WorldModel,
        settings: PlannerSettings,
        *,
        dtype: torch.dtype = torch.float32,
        kernels: Kernels = EAGER,
        batch_sizes: tuple[int, ...] = (1,),
        explore: bool = False,
    ) -> None:
        """`batch_sizes` must contain 1, so that every number of rows is met without padding; `explore` adds training noise."""
        assert 1 in batch_sizes
        self.settings = settings
        self._rollout_model = model
        self._compute_model = model.compute_copy(dtype)
        self._kernels = kernels
        self._batch_sizes = sorted(batch_sizes, reverse=True)
        self._explore = explore

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes over the model's weights, after an optimiser changed them."""
        torch._foreach_copy_(list(self._compute_model.parameters()), list(self._rollout_model.parameters()))

    def __call__(self, z: Tensor, warm_start: Tensor, streams: Tensor, steps: Tensor) -> Plan:
        """z [B, Z], warm_start [B, H, A], streams and steps [B] int64 → a plan of B rows, B ≥ 1."""
        parts, done = [], 0
        while done < z.shape[0]:
            size = next(size for size in self._batch_sizes if size <= z.shape[0] - done)
            rows = slice(done, done + size)
            noise = self.draw(streams[rows], steps[rows], z.device)
            parts.append(
                plan(
                    self._compute_model,
                    z[rows],
                    warm_start[rows],
                    noise,
                    self.settings,
                    kernels=self._kernels,
                    rollout_model=self._rollout_model,
                )
            )
            done += size
        return parts[0].concatenate(*parts[1:])

    def draw(self, streams: Tensor, steps: Tensor, device: torch.device) -> PlannerNoise:
        """The draws of B rows, each from a Philox generator keyed by its (stream, step)."""
        dims = self._rollout_model.dims
        rows = [
            draw_row(self.settings, dims.action_dim, dims.num_q, np.random.Generator(np.random.Philox(key=[stream, step])))
            for stream, step in zip(streams.tolist(), steps.tolist(), strict=True)
        ]
        prior, sample, terminal, q_index, exponential, action = (
            torch.from_numpy(np.stack(draws)).to(device) for draws in zip(*rows, strict=True)
        )
        return PlannerNoise(prior, sample, terminal, q_index, exponential, action if self._explore else None)


def draw_row(s: PlannerSettings, action_dim: int, num_q: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """One row's draws, in the order and with the shapes (less B) of `PlannerNoise`."""

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    return (
        normal(s.num_pi_trajs, s.horizon, action_dim),
        normal(s.iterations, s.num_samples - s.num_pi_trajs, s.horizon, action_dim),
        normal(s.iterations, s.num_samples, action_dim),
        np.stack([rng.permutation(num_q)[:2] for _ in range(s.iterations)]).astype(np.int64),
        rng.standard_exponential(s.num_elites, dtype=np.float32),
        normal(action_dim),
    )
