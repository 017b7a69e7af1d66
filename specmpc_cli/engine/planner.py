"""TD-MPC2's planner (Hansen et al., 2024, §3.2): MPPI over latent rollouts, batched over rows and pure.

Every random draw comes in as one `PlannerNoise`, so a plan is a function of its arguments. What differs from the official code, without
changing a value: axes are batch-first [B, N, H, A], each row has its own draws, only the two drawn Q-heads are evaluated, and the policy
prior's candidates, which every iteration values anew, are rolled out once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from specmpc_cli.engine.world_model import WorldModel
from specmpc_cli.types import Plan


@dataclass(frozen=True, slots=True)
class PlannerSettings:
    """MPPI's numbers (STYLE glossary); `temperature` is TD-MPC2's inverse temperature.

    `first_std` is the spread of the first iteration, `max_std` if None: a narrower one refines the warm start instead of searching anew.
    """

    discount: float
    horizon: int = 3
    iterations: int = 6
    num_samples: int = 512
    num_elites: int = 64
    num_pi_trajs: int = 24
    min_std: float = 0.05
    max_std: float = 2.0
    temperature: float = 0.5
    first_std: float | None = None


@dataclass(frozen=True, slots=True)
class PlannerNoise:
    """All draws of B plans."""

    prior_eps: Tensor  # [B, P, H, A] standard normal: the policy prior's rollouts
    sample_eps: Tensor  # [B, I, N-P, H, A] standard normal: candidates of each iteration
    terminal_eps: Tensor  # [B, I, N, A] standard normal: the policy's action at each candidate's last latent
    q_index: Tensor  # [B, I, 2] int64: the two Q-heads of each iteration
    exponential: Tensor  # [B, K] ~ Exp(1): which elite is executed (the Gumbel trick)
    action_eps: Tensor | None = None  # [B, A] standard normal: exploration noise on the first action, None when evaluating


class Rollouts(NamedTuple):
    """Candidates, and where the model says that they lead."""

    actions: Tensor  # [B, N, H, A]
    last: Tensor  # [B, N, Z] the latents they end in
    returns: Tensor  # [B, N] discounted rewards on the way
    weight: Tensor  # [B, N] of the value at the end: discount^H, or 0 where the episode ended before


class Search(NamedTuple):
    """Where the search stands after an iteration."""

    mean: Tensor  # [B, H, A]
    std: Tensor  # [B, H, A]
    elites: Tensor  # [B, K, H, A]
    scores: Tensor  # [B, K] normalised weights of the elites
    elite_values: Tensor  # [B, K]
    values: Tensor  # [B, N] of all candidates, prior samples first


class Dynamics(Protocol):
    """What predicts latents: a world model, or a part of one."""

    def next(self, z: Tensor, a: Tensor) -> Tensor: ...


class Behaviour(Dynamics, Protocol):
    """What latents are seen by, and what plans go on by where they end: dynamics, and the policy prior's mean."""

    def encode(self, obs: Tensor) -> Tensor: ...

    def pi_mean(self, z: Tensor) -> Tensor: ...


def plan(
    model: WorldModel,
    z: Tensor,
    warm_start: Tensor,
    noise: PlannerNoise,
    settings: PlannerSettings,
    *,
    kernels: Kernels | None = None,
    dynamics: Dynamics | None = None,
    on_iteration: Callable[[Search], None] | None = None,
) -> Plan:
    """Plans from latents z [B, Z].

    Args:
        warm_start: [B, H, A], the previous mean shifted by its age; zeros on an episode's first step.
        dynamics: predicts `Plan.latents`, by default `model`; in fp32, because these latents are compared with real ones.
        on_iteration: sees each iteration's `Search` (parity tests).

    Returns:
        A plan whose `actions` [B, H, A] are one elite drawn by weight, as the official code executes it.
    """
    rows, horizon = z.shape[0], settings.horizon
    assert warm_start.shape[:2] == (rows, horizon), (warm_start.shape, rows, horizon)
    kernels = kernels or EAGER
    prior = kernels.prior_rollouts(model, z, noise.prior_eps, settings.discount)
    mean = warm_start.clone()  # of the same kind as later means, if made in inference mode: the compiler tells them apart
    std = torch.full_like(mean, settings.max_std if settings.first_std is None else settings.first_std)
    search = None
    for i in range(settings.iterations):
        search = kernels.iterate(
            model, z, mean, std, prior, noise.sample_eps[:, i], noise.terminal_eps[:, i], noise.q_index[:, i], settings
        )
        mean, std = search.mean, search.std
        if on_iteration is not None:
            on_iteration(search)
    assert search is not None, "a plan needs at least one iteration"
    return Plan(*kernels.select(dynamics or model, z, search, noise.exponential, noise.action_eps))


def prior_rollouts(model: WorldModel, z: Tensor, eps: Tensor, discount: float) -> Rollouts:
    """P rollouts of the policy prior from z [B, Z] with eps [B, P, H, A]."""
    latents, actions = [z.unsqueeze(1).expand(-1, eps.shape[1], -1)], []
    for noise in eps.unbind(2):
        actions.append(model.pi_sample(latents[-1], noise))
        latents.append(model.next(latents[-1], actions[-1]))
    return _valued(model, latents, torch.stack(actions, dim=2), discount)


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
    """One MPPI iteration: sample candidates, value them, refit the sampling distribution to the elites."""
    # Candidates: the policy prior's, then draws from the sampling distribution.
    drawn = (mean.unsqueeze(1) + std.unsqueeze(1) * sample_eps).clamp(-1, 1)
    both = zip(prior, rollouts(model, z, drawn, settings.discount), strict=True)
    candidates = Rollouts(*(torch.cat(pair, dim=1) for pair in both))
    values = final_values(model, candidates, terminal_eps, q_index).nan_to_num(0)  # [B, N]

    # Elites and their weights.
    elite_values, index = _largest(values, settings.num_elites)  # [B, K]
    elites = candidates.actions.gather(1, index[..., None, None].expand(-1, -1, *drawn.shape[2:]))  # [B, K, H, A]
    scores = torch.exp(settings.temperature * (elite_values - elite_values[:, :1]))
    scores = scores / scores.sum(1, keepdim=True)

    # The weighted mean and spread of the elites.
    weight = scores[..., None, None]
    total = scores.sum(1)[:, None, None] + 1e-9
    mean = (weight * elites).sum(1) / total
    std = ((weight * (elites - mean.unsqueeze(1)) ** 2).sum(1) / total).sqrt()
    return Search(mean, std.clamp(settings.min_std, settings.max_std), elites, scores, elite_values, values)


def _largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of values [B, N] in descending order, and their indices, both [B, count]."""
    if values.is_cuda and torch.compiler.is_compiling():
        return largest_by_rank(values, count)
    largest, index = torch.topk(values, count, dim=1)
    return largest, index


def largest_by_rank(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of values [B, N] in descending order, ties by index, and their indices, both [B, count]; no value may be NaN.

    Compares all with all: compiled, that is two short kernels, where `topk` selects, sorts and copies. Eagerly it would hold some
    tensors [B, N, N].
    """
    position = torch.arange(values.shape[1], device=values.device)
    theirs, ours = values.unsqueeze(1), values.unsqueeze(2)  # [B, 1, N], [B, N, 1]
    before = (theirs > ours) | ((theirs == ours) & (position < position.unsqueeze(1)))
    rank = before.sum(2, dtype=torch.int32)  # [B, N]
    has_rank = rank.unsqueeze(1) == position[:count, None]  # [B, count, N], one in each row
    index = (has_rank * position).sum(2)
    return values.gather(1, index), index


def rollouts(model: WorldModel, z: Tensor, actions: Tensor, discount: float) -> Rollouts:
    """Action sequences [B, N, H, A] from z [B, Z]."""
    latents = [z.unsqueeze(1)]  # [B, 1, Z]: at first all candidates share it
    for action in actions.unbind(2):
        latents.append(model.next(latents[-1], action))
    return _valued(model, latents, actions, discount)


def _valued(model: WorldModel, latents: Sequence[Tensor], actions: Tensor, discount: float) -> Rollouts:
    """Rollouts through these H+1 latents [B, N, Z] (the first may be [B, 1, Z]) by actions [B, N, H, A]."""
    returns = torch.zeros_like(actions[..., 0, 0])
    ended = torch.zeros_like(returns)
    weight = 1.0
    for reward, after in zip(_rewards(model, latents[:-1], actions), latents[1:], strict=True):
        returns = returns + weight * (1 - ended) * reward
        weight *= discount
        if model.termination_net is not None:
            ended = (ended + model.terminates(after)).clamp(max=1)
    return Rollouts(actions, latents[-1], returns, weight * (1 - ended))


def final_values(model: WorldModel, candidates: Rollouts, terminal_eps: Tensor, q_index: Tensor) -> Tensor:
    """Returns of candidates and the value of where they end, by the Q-heads q_index [B, 2] at a draw of the policy prior, with terminal_eps
    [B, N, A]; → [B, N].
    """
    action = model.pi_sample(candidates.last, terminal_eps)
    return candidates.returns + candidates.weight * model.q_pair(candidates.last, action, q_index)


def _rewards(model: WorldModel, latents: Sequence[Tensor], actions: Tensor) -> Sequence[Tensor]:
    """Rewards [B, N] of each step, of actions [B, N, H, A] at latents [B, N, Z] (the first may be [B, 1, Z])."""
    if actions.is_cuda:
        return rewards_at_once(model, latents, actions)
    # One step's rows fill a CPU; more would only leave its caches.
    return [model.reward(z, action) for z, action in zip(latents, actions.unbind(2), strict=True)]


def rewards_at_once(model: WorldModel, latents: Sequence[Tensor], actions: Tensor) -> Sequence[Tensor]:
    """Rewards [B, N] of each of H steps from one product of B·N·H rows; arguments as above."""
    alike = torch.stack([z.expand(*actions.shape[:2], -1) for z in latents], dim=2)  # [B, N, H, Z]
    return model.reward(alike, actions).unbind(2)


def select(dynamics: Dynamics, z: Tensor, search: Search, exponential: Tensor, action_eps: Tensor | None) -> tuple[Tensor, ...]:
    """Draws one elite by weight, adds exploration noise if there is any, and predicts the latents it leads through.

    z [B, Z], exponential [B, K], action_eps [B, A] or None → the fields of a `Plan`: actions [B, H, A], latents [B, H+1, Z], mean and std
    [B, H, A], value [B].
    """
    drawn = (torch.log(search.scores) - torch.log(exponential)).argmax(1)  # [B]
    row = torch.arange(z.shape[0], device=z.device)
    actions, std = search.elites[row, drawn], search.std
    if action_eps is not None:
        actions = torch.cat([actions[:, :1] + (std[:, 0] * action_eps).unsqueeze(1), actions[:, 1:]], dim=1)
    actions = actions.clamp(-1, 1)
    latents = [z]
    for t in range(actions.shape[1]):
        latents.append(dynamics.next(latents[-1], actions[:, t]))
    return actions, torch.stack(latents, dim=1), search.mean, std, search.elite_values[row, drawn]


class Kernels(NamedTuple):
    """The functions that take nearly all of a plan's time; engine/compiled.py provides compiled ones.

    `packed`: on a CPU they are to be given a model that is (`WorldModel.pack`).
    """

    prior_rollouts: Callable[[WorldModel, Tensor, Tensor, float], Rollouts]
    iterate: Callable[..., Search]
    select: Callable[..., tuple[Tensor, ...]] = select
    packed: bool = False


EAGER = Kernels(prior_rollouts, iterate)
