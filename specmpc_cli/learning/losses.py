"""TD-MPC2's losses (Hansen et al., 2024, §3.1, equations 3 and 4): tensors in, tensors out.

Sequences are time-first, [H+1, B, ...], because the latent rollout walks along time. All random draws come in as one `UpdateNoise`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from specmpc_cli.engine.native.learnt_mlp import Dropout
from specmpc_cli.engine.twohot import two_hot_loss
from specmpc_cli.engine.world_model import WorldModel


class Batch(NamedTuple):
    """B slices of H transitions, none of which crosses an episode's end."""

    obs: Tensor  # [H+1, B, O]
    action: Tensor  # [H, B, A] taken at obs[:-1]
    reward: Tensor  # [H, B]
    terminated: Tensor  # [H, B] 1.0 where obs[1:] is terminal
    task: Tensor | None = None  # [B] int64: each slice's task, for models of a task set
    demonstrated: Tensor | None = None  # [B] 1.0 where the actions are a demonstration's, for trainings that have some


class UpdateNoise(NamedTuple):
    """All draws of one update."""

    td_eps: Tensor  # [H, B, A] standard normal: the policy's action in the TD target
    td_q_index: Tensor  # [2] int64: the two target heads of the TD target
    pi_eps: Tensor  # [H+1, B, A] standard normal: the policy's action in its own loss
    pi_q_index: Tensor  # [2] int64: the two heads of the policy loss
    q_dropout: Dropout | None = None  # [E, H·B, mlp_dim] of the first layer of every Q-head; None without dropout
    pi_q_dropout: Dropout | None = None  # [2, (H+1)·B, mlp_dim] likewise, of the two heads of the policy loss


@dataclass(frozen=True, slots=True)
class LossSettings:
    """The numbers of the losses (TD-MPC2, appendix H)."""

    discount: float  # for models of a task set the learner has one per task
    rho: float = 0.5  # weight of a step of the rollout over the one before it
    consistency_coef: float = 20.0
    reward_coef: float = 0.1
    value_coef: float = 0.1
    termination_coef: float = 1.0
    entropy_coef: float = 1e-4
    demonstration_coef: float = 1.0  # of the imitation of demonstrated actions, where there are any
    tau: float = 0.01  # rate of the target network and of the running scale


class ModelLoss(NamedTuple):
    """The world model's loss, its parts (before their coefficients), and the latents it rolled out."""

    total: Tensor
    consistency: Tensor
    reward: Tensor
    value: Tensor
    termination: Tensor
    latents: Tensor  # [H+1, B, Z], detached


class PolicyDraw(NamedTuple):
    """Actions of the policy prior [..., A], their entropies and scaled entropies [...]. The latter are before squashing, times the task's
    number of action dimensions, as the official code has it.
    """

    action: Tensor
    entropy: Tensor
    scaled_entropy: Tensor


class PolicyLoss(NamedTuple):
    """The policy prior's loss, its entropies, and the running scale after this update."""

    total: Tensor
    entropy: Tensor
    scaled_entropy: Tensor
    scale: Tensor  # []


def world_model_loss(model: WorldModel, batch: Batch, noise: UpdateNoise, s: LossSettings, discounts: Tensor | None = None) -> ModelLoss:
    """Latent consistency, reward, value and termination over a latent rollout of the batch's actions.

    `discounts` [tasks] takes the place of the settings' discount for models of a task set.
    """
    task = batch.task
    with torch.no_grad():
        seen = model.encode(batch.obs[1:], task)  # [H, B, Z]
        action = model.pi_sample(seen, noise.td_eps, task)
        values = model.decode(model.q_target.of_rows(model.with_task(seen, task), action, q_index=noise.td_q_index))  # [2, H, B]
        target = td_target(values, batch, s, discounts)
    latents = [model.encode(batch.obs[0], task)]
    for action in batch.action:
        latents.append(model.next(latents[-1], action, task))
    z = torch.stack(latents)  # [H+1, B, Z]
    from_z = model.with_task(z[:-1], task)

    weight = s.rho ** torch.arange(len(batch.reward), device=z.device)  # [H]
    bins = model.dims.vmin, model.dims.vmax
    consistency = ((z[1:] - seen).square().mean((1, 2)) * weight).mean()
    reward = (two_hot_loss(model.reward_net(from_z, batch.action), batch.reward, *bins).mean(1) * weight).mean()
    logits = model.q.of_rows(from_z, batch.action, mask=_mask(noise.q_dropout))  # [E, H, B, bins]
    value = (two_hot_loss(logits, target, *bins).mean((0, 2)) * weight).mean()
    termination = torch.zeros_like(value)
    if model.termination_net is not None:
        logit = model.termination_net(model.with_task(z[1:], task)).squeeze(-1)
        termination = F.binary_cross_entropy_with_logits(logit, batch.terminated)
    total = s.consistency_coef * consistency + s.reward_coef * reward + s.value_coef * value + s.termination_coef * termination
    return ModelLoss(total, consistency.detach(), reward.detach(), value.detach(), termination.detach(), z.detach())


def td_target(values: Tensor, batch: Batch, s: LossSettings, discounts: Tensor | None = None) -> Tensor:
    """Reward plus the discounted minimum of two target heads' values [2, H, B] at the policy prior's action; [H, B]."""
    discount = s.discount if discounts is None else discounts[batch.task]  # or [B]
    return batch.reward + discount * (1 - batch.terminated) * values.amin(0)


def policy_loss(model: WorldModel, z: Tensor, noise: UpdateNoise, scale: Tensor, s: LossSettings, batch: Batch) -> PolicyLoss:
    """Scaled value and entropy of the policy prior's action at the latents z [H+1, B, Z] of the batch.

    The caller keeps gradients from the Q-heads' weights (gradients.py): only the policy is to learn from this.
    """
    task = batch.task
    drawn = draw_policy(model, z, noise.pi_eps, task)
    logits = model.q.of_rows(model.with_task(z, task), drawn.action, q_index=noise.pi_q_index, mask=_mask(noise.pi_q_dropout))
    values = model.decode(logits).mean(0)  # [H+1, B]
    scale = torch.lerp(scale, percentile_range(values[0].detach()).clamp(min=1.0), s.tau)
    weight = s.rho ** torch.arange(len(z), device=z.device)
    total = (-(s.entropy_coef * drawn.scaled_entropy + values / scale).mean(1) * weight).mean()
    if batch.demonstrated is not None:
        total = total + imitation_loss(drawn.action, batch.action, batch.demonstrated, s)
    return PolicyLoss(total, drawn.entropy.mean().detach(), drawn.scaled_entropy.mean().detach(), scale)


def imitation_loss(drawn: Tensor, shown: Tensor, demonstrated: Tensor, s: LossSettings) -> Tensor:
    """How far the policy's draws [H+1, B, A] are from actions [H, B, A] where `demonstrated` [B] says that these are demonstrations.

    Our addition, after MoDem (Hansen et al., 2023), which clones them before it trains. Draws, not means: with a free spread, TD targets
    would value noise around the right actions.
    """
    weight = s.rho ** torch.arange(len(shown), device=shown.device)
    distance = (drawn[:-1] - shown).square().sum(-1)  # [H, B]
    return s.demonstration_coef * ((distance * demonstrated).mean(1) * weight).mean()


def draw_policy(model: WorldModel, z: Tensor, eps: Tensor, task: Tensor | None) -> PolicyDraw:
    """The policy prior's draw at z [..., Z] for standard normal eps [..., A]."""
    mean, log_std = model.pi(z, task)
    eps = model.mask_action(eps, task)
    action = torch.tanh(mean + eps * torch.exp(log_std))
    # The official code sums over padded dimensions too; each adds a constant.
    gaussian = (-0.5 * eps.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)
    entropy = -(gaussian - torch.log(F.relu(1 - action.square()) + 1e-6).sum(-1))
    dimensions = action.shape[-1] if model.task_emb is None else model.action_masks[task].sum(-1)
    return PolicyDraw(action, entropy, -gaussian * dimensions)


def _mask(dropout: Dropout | None) -> Tensor | None:
    return None if dropout is None else dropout.mask()


def percentile_range(x: Tensor) -> Tensor:
    """Distance of the 5th and 95th percentile of x [n], linearly interpolated."""
    ordered = x.sort().values
    bounds = []
    for share in (0.05, 0.95):
        position = share * (len(x) - 1)
        below = int(position)
        above = min(below + 1, len(x) - 1)
        bounds.append(torch.lerp(ordered[below], ordered[above], position - below))
    return bounds[1] - bounds[0]
