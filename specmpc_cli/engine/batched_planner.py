"""The planner as the runner calls it: any number of rows, with the random draws of each row's own stream (draws.py)."""

from __future__ import annotations

from copy import copy
from dataclasses import fields, replace

import torch
from torch import Tensor

from specmpc_cli.engine import native
from specmpc_cli.engine.captured import CapturedCall
from specmpc_cli.engine.draws import Draws, host_draws
from specmpc_cli.engine.packed_planner import PackedBehaviour
from specmpc_cli.engine.planner import EAGER, Behaviour, Kernels, PlannerNoise, PlannerSettings, plan
from specmpc_cli.engine.world_model import WorldModel
from specmpc_cli.types import Plan


class Networks:
    """What plans, made of one model: a copy for the search, in its dtype, and in fp32 what encodes and predicts (`planner.Behaviour`).

    What can be packed is, when it is first asked for anything, because that may have to build the kernels.
    """

    def __init__(self, model: WorldModel, dtype: torch.dtype, packed: bool) -> None:
        assert dtype is not torch.int8 or packed
        self._model, self._dtype = model, dtype
        self._search = model.compute_copy(dtype)
        self._behaviour: Behaviour = model
        self._to_pack = packed

    def ready(self) -> tuple[WorldModel, Behaviour]:
        """What searches, and what encodes and predicts."""
        if self._to_pack:
            self._search.pack(int8=self._dtype is torch.int8)
            if self._search.packed:
                self._search.take_weights(self._model)  # with biases as exact as they will be after every other change
            if next(self._model.parameters()).device.type == "cpu" and native.multiplies(torch.float32):
                self._behaviour = PackedBehaviour(self._model)
            self._to_pack = False
        return self._search, self._behaviour

    def encode(self, obs: Tensor) -> Tensor:
        """As the model's."""
        return self.ready()[1].encode(obs)

    def next(self, z: Tensor, a: Tensor) -> Tensor:
        """As the model's."""
        return self.ready()[1].next(z, a)

    def pi_mean(self, z: Tensor) -> Tensor:
        """As the model's."""
        return self.ready()[1].pi_mean(z)

    def take_weights(self) -> None:
        """Takes over the model's weights."""
        self._search.take_weights(self._model)
        if isinstance(self._behaviour, PackedBehaviour):
            self._behaviour.renew()


class BatchedPlanner:
    """Plans rows in a few fixed batch sizes, so that few shapes are compiled.

    On a CPU one plan's 512 candidates already fill the cores, so rows are planned one at a time there: the same speed, and results
    are equal to the last bit whatever shares the batch. On CUDA a whole plan, draws included, is one graph per batch size.
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
        draws: Draws = host_draws,
    ) -> None:
        """
        Args:
            dtype: of the products that value candidates: fp32, bf16 or, with kernels that are packed on a CPU that has them, int8.
            batch_sizes: rows per call; must contain 1. A size that is at most half empty is filled up with copies, because the time of
                a small batch is that of its launches.
            explore: adds training noise to the first action.
            draws: where the random draws are made; on CUDA they must be made on the device.
        """
        assert 1 in batch_sizes
        self.settings = settings
        self._dims = model.dims
        self.networks = Networks(model, dtype, kernels.packed)
        self._kernels = kernels
        self._batch_sizes = sorted(batch_sizes)
        self._explore, self._draws = explore, draws
        self._device = next(model.parameters()).device
        self._calls = self._captured_calls()
        self._refresh = CapturedCall(self._take_weights, self._device)

    def _captured_calls(self) -> dict[int, CapturedCall]:
        return {size: CapturedCall(self._plan, self._device) for size in self._batch_sizes}

    def refining(self, iterations: int, first_std: float) -> BatchedPlanner:
        """A planner of the same networks that refines its warm starts: fewer iterations, the first of which spreads less."""
        other = copy(self)
        other.settings = replace(self.settings, iterations=iterations, first_std=first_std)
        other._calls = other._captured_calls()
        return other

    def refresh(self) -> None:
        """Takes over the model's weights, after an optimiser changed them."""
        self._refresh()

    def _take_weights(self) -> tuple[Tensor, ...]:
        self.networks.take_weights()
        return ()

    def __call__(self, z: Tensor, warm_start: Tensor, streams: Tensor, steps: Tensor) -> Plan:
        """z [B, Z], warm_start [B, H, A], streams and steps [B] int64 → a plan of B rows, B ≥ 1."""
        total = z.shape[0]
        if total in self._calls:  # no rows to pick
            return Plan(*self._calls[total](z, warm_start, streams, steps))
        parts, done = [], 0
        while done < total:
            size = self._size_for(total - done)
            rows = torch.arange(done, done + size, device=z.device).clamp(max=total - 1)
            made = Plan(*self._calls[size](z[rows], warm_start[rows], streams[rows], steps[rows]))
            parts.append(made if done + size <= total else made.take(torch.arange(total - done, device=z.device)))
            done += size
        return parts[0].concatenate(*parts[1:])

    def _size_for(self, rows: int) -> int:
        """The rows that the next call takes while `rows` are left."""
        fits = max(size for size in self._batch_sizes if size <= rows)
        roomier = min((size for size in self._batch_sizes if size >= rows), default=fits)
        return roomier if roomier <= 2 * rows else fits

    def sizes_for(self, rows: int) -> list[int]:
        """The batch sizes that calls with up to `rows` rows meet."""
        return sorted({self._size_for(left) for left in range(1, rows + 1)})

    def _plan(self, z: Tensor, warm_start: Tensor, streams: Tensor, steps: Tensor) -> tuple[Tensor, ...]:
        """The fields of a plan of as many rows as one call takes, draws included."""
        search, dynamics = self.networks.ready()
        made = plan(search, z, warm_start, self.draw(streams, steps), self.settings, kernels=self._kernels, dynamics=dynamics)
        return tuple(getattr(made, field.name) for field in fields(made))

    def draw(self, streams: Tensor, steps: Tensor) -> PlannerNoise:
        """The draws of B rows, each keyed by its (stream, step)."""
        noise = self._draws(self.settings, self._dims.action_dim, self._dims.num_q, streams, steps)
        return noise if self._explore else replace(noise, action_eps=None)
