"""The planner's functions for a packed model, as a CPU computes them: each in one call of ours (engine/native/search.h).

The formulas are planner.py's, which the tests compare them with, for a packed model answers as any other. A call takes every candidate
through all steps and networks, so that between calls there is nothing left to compile, and a plan has next to no Python.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from specmpc_cli.engine.layers import Stack
from specmpc_cli.engine.packed import PackedMlp
from specmpc_cli.engine.planner import PlannerSettings, Rollouts, Search
from specmpc_cli.engine.world_model import WorldModel


def prior_rollouts(model: WorldModel, z: Tensor, eps: Tensor, discount: float) -> Rollouts:
    """As `planner.prior_rollouts`."""
    return Rollouts(*torch.ops.specmpc.prior_rollouts(z, eps, discount, *_networks(model)))


def iterate(
    model: WorldModel,
    z: Tensor,
    mean: Tensor,
    std: Tensor,
    prior: Rollouts,
    sample_eps: Tensor,
    terminal_eps: Tensor,
    q_index: Tensor,
    settings: PlannerSettings,
) -> Search:
    """As `planner.iterate`, down to which candidates of one value are elites."""
    s = settings
    numbers = s.num_elites, s.discount, s.temperature, s.min_std, s.max_std
    found = torch.ops.specmpc.iterate(z, mean, std, prior, sample_eps, terminal_eps, q_index, *_networks(model), *numbers)
    return Search(*found)


class PackedBehaviour:
    """A model's encoder, dynamics and policy prior, packed as they are: in fp32. A single task's."""

    @torch.inference_mode(False)
    def __init__(self, model: WorldModel) -> None:
        self._encoder, self._dynamics, self._policy = (_Renewed(net) for net in (model.encoder, model.dynamics, model.pi_net))
        self._action_dim = model.dims.action_dim

    def encode(self, obs: Tensor) -> Tensor:
        """obs [B, O] → [B, Z]."""
        return self._encoder(obs)

    def next(self, z: Tensor, a: Tensor) -> Tensor:
        """z [B, Z] and a [B, A] → [B, Z]."""
        return self._dynamics(torch.cat([z, a], dim=-1))

    def pi_mean(self, z: Tensor) -> Tensor:
        """z [B, Z] → [B, A]."""
        return torch.tanh(self._policy(z)[:, : self._action_dim])

    def renew(self) -> None:
        """Takes over the model's weights, each net's when it is next asked."""
        for net in (self._encoder, self._dynamics, self._policy):
            net.stale = True


class _Renewed:
    """A stack, packed; anew when it is asked, if it is stale: while a training acts, not all are."""

    def __init__(self, stack: Stack) -> None:
        self.stale = False
        self._stack, self._packed = stack, PackedMlp(*stack.values(), stack.ends_in)

    def __call__(self, x: Tensor) -> Tensor:
        if self.stale:
            self._packed.renew(*self._stack.values())
            self.stale = False
        return self._packed(x)


def _networks(model: WorldModel) -> tuple[list[Tensor], list[Tensor], list[int], list[float]]:
    """Weights, vectors, sizes and ranges, as the operators take them."""
    d = model.dims
    nets = (model.dynamics, model.reward_net, model.pi_net, model.q.layers, model.termination_net)
    packed = [cast(PackedMlp, net.packed) for net in nets if net is not None]
    assert all(packed), "a model that is not packed, or only in part"
    sizes = [d.latent_dim, d.action_dim, d.mlp_dim, d.num_bins, d.simnorm_dim]
    return [net.weights for net in packed], [net.vectors for net in packed], sizes, [d.vmin, d.vmax, d.log_std_min, d.log_std_max]
