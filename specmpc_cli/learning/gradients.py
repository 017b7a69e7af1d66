"""The losses with their gradients: autograd's, or, on a CPU that has kernels of our own, passed by hand from call to call of these."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from specmpc_cli.engine import native
from specmpc_cli.engine.compiled import compiled
from specmpc_cli.engine.layers import weights_and_vectors
from specmpc_cli.engine.native import MISH
from specmpc_cli.engine.native.learnt_mlp import Keep, LearntCall, LearntMlp, LearntRollout
from specmpc_cli.engine.world_model import WorldModel
from specmpc_cli.learning.losses import (
    Batch,
    LossSettings,
    ModelLoss,
    PolicyDraw,
    PolicyLoss,
    UpdateNoise,
    imitation_loss,
    policy_loss,
    td_target,
    world_model_loss,
)
from specmpc_cli.runtime import Runtime


class Gradients(Protocol):
    """The two losses of one model. A call adds the gradients to those of what is to learn from the loss, and returns values without any."""

    def world_model(self, batch: Batch, noise: UpdateNoise) -> ModelLoss: ...

    def policy(self, z: Tensor, noise: UpdateNoise, scale: Tensor, batch: Batch) -> PolicyLoss: ...


def gradients_for(model: WorldModel, s: LossSettings, discounts: Tensor | None, runtime: Runtime) -> Gradients:
    """The fastest there are here; arguments as of `world_model_loss`."""
    if native.serves(runtime, runtime.dtype):
        return KernelGradients(model, s, discounts, runtime)
    return AutogradGradients(model, s, discounts, runtime)


class AutogradGradients:
    """Autograd's, of compiled or eager losses, in the runtime's dtype."""

    def __init__(self, model: WorldModel, s: LossSettings, discounts: Tensor | None, runtime: Runtime) -> None:
        self._model, self._s, self._discounts, self._runtime = model, s, discounts, runtime
        losses = _Losses(world_model_loss, policy_loss)
        self._losses = _Losses(compiled(world_model_loss), compiled(policy_loss)) if runtime.compiled else losses

    def world_model(self, batch: Batch, noise: UpdateNoise) -> ModelLoss:
        with self._autocast():
            loss = self._losses.world_model(self._model, batch, noise, self._s, self._discounts)
        loss.total.backward()
        return loss._replace(total=loss.total.detach())

    def policy(self, z: Tensor, noise: UpdateNoise, scale: Tensor, batch: Batch) -> PolicyLoss:
        with _fixed(self._model.q), self._autocast():
            loss = self._losses.policy(self._model, z, noise, scale, self._s, batch)
        loss.total.backward()
        return loss._replace(total=loss.total.detach())

    def _autocast(self) -> torch.autocast:
        # No cache: a weight that is cast first under no_grad, for the targets, would be reused without its gradient.
        bf16 = self._runtime.dtype is torch.bfloat16
        return torch.autocast(self._runtime.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)


class _Losses(NamedTuple):
    """`world_model_loss` and `policy_loss`, as they are computed."""

    world_model: Callable[[WorldModel, Batch, UpdateNoise, LossSettings, Tensor | None], ModelLoss]
    policy: Callable[[WorldModel, Tensor, UpdateNoise, Tensor, LossSettings, Batch], PolicyLoss]


@contextmanager
def _fixed(module: nn.Module) -> Iterator[None]:
    """No gradients for this module's weights inside."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


class KernelGradients:
    """By kernels of our own (engine/native), a call for each network or loss, forwards and back. Operations between them, each a kernel of
    a few microseconds and a node of a graph, compiled or not, took a quarter of an update's time.
    """

    def __init__(self, model: WorldModel, s: LossSettings, discounts: Tensor | None, runtime: Runtime) -> None:
        """Needs `native.multiplies` for the runtime's dtype."""
        self._model, self._s, self._discounts = model, s, discounts
        self._range = model.dims.vmin, model.dims.vmax
        self._log_std_range = model.dims.log_std_min, model.dims.log_std_max
        self._coefs = (s.consistency_coef, s.reward_coef, s.value_coef, s.termination_coef)

        def learnt(layers: Iterable[nn.Module], ends_in: int, dtype: torch.dtype = runtime.dtype) -> LearntMlp:
            return LearntMlp(*weights_and_vectors(layers), ends_in, bf16=dtype is torch.bfloat16)

        first, *others = model.encoder
        self._sensors = learnt([first], MISH, torch.float32)  # as in WorldModel.encode
        self._encoder = learnt(others, model.encoder.ends_in)
        nets = (model.dynamics, model.reward_net, model.pi_net, model.q.layers, model.q_target.layers)
        self._dynamics, self._reward, self._pi, self._q, self._q_target = (learnt(net, net.ends_in) for net in nets)
        ended = model.termination_net
        self._termination = None if ended is None else learnt(ended, ended.ends_in)

    @torch.no_grad()
    def world_model(self, batch: Batch, noise: UpdateNoise) -> ModelLoss:
        tasks = _Tasks(self._model, batch.task)
        seen = self._encode(batch.obs[1:], tasks)[1].y
        sensed, encoded = self._encode(batch.obs[0], tasks, Keep.FOR_PARAMETERS)
        rollout = self._dynamics.rollout(encoded.y, tasks.embedded, batch.action)
        z = rollout.latents  # [H+1, B, Z]
        taken = *tasks.beside(z[:-1]), batch.action.flatten(0, 1)
        reward = self._reward(*taken, keep=Keep.FOR_PARAMETERS)
        q = self._q(*taken, keep=Keep.FOR_PARAMETERS, dropout=noise.q_dropout)
        ended = None if self._termination is None else self._termination(*tasks.beside(z[1:]), keep=Keep.FOR_PARAMETERS)

        made = (z, seen, reward.y, q.y, None if ended is None else ended.y)
        true = (batch.reward, self._targets(seen, batch, noise, tasks), batch.terminated)
        losses, of_z, of_reward, of_q, of_ended = torch.ops.specmpc.rollout_loss(*made, *true, self._s.rho, self._coefs, *self._range)

        of_z[:-1] += tasks.to_x(reward, of_reward).view_as(of_z[:-1])
        of_z[:-1] += tasks.to_x(q, of_q).view_as(of_z[:-1])
        if ended is not None:
            of_z[1:] += tasks.to_x(ended, of_ended).view_as(of_z[1:])
        tasks.back_through(rollout, of_z)
        (of_sensed,), of_parameters = encoded.gradients(of_z[0], True)
        _learn(encoded.mlp, of_parameters)
        tasks.back(sensed, of_sensed)
        tasks.learn()
        return ModelLoss(*losses, latents=z)

    def _encode(self, obs: Tensor, tasks: _Tasks, keep: Keep = Keep.NOTHING) -> tuple[LearntCall, LearntCall]:
        """Observations [..., B, O] through the layer that reads them, and through those after it → latents [N, Z]."""
        sensed = self._sensors(*tasks.beside(obs), keep=keep)
        return sensed, self._encoder(sensed.y, keep=keep)

    def _targets(self, seen: Tensor, batch: Batch, noise: UpdateNoise, tasks: _Tasks) -> Tensor:
        """TD targets [H, B] from the latents [H·B, Z] of the observations after the first."""
        rows = tasks.beside(seen.view(*batch.reward.shape, -1))
        action, *_ = self._draw(self._pi(*rows).y, noise.td_eps, self._masks(noise.td_eps, batch.task))
        q = self._q_target(*rows, action.flatten(0, 1), heads=self._model.q.picked(noise.td_q_index))
        values = torch.ops.specmpc.decode(q.y, *self._range).unflatten(1, batch.reward.shape)
        return td_target(values, batch, self._s, self._discounts)

    def _draw(self, features: Tensor, eps: Tensor, masks: Tensor | None) -> PolicyDraw:
        """From what the policy prior's network made [N, 2A], for standard normal eps [..., A]."""
        return PolicyDraw(*torch.ops.specmpc.draw_policy(features, eps, masks, *self._log_std_range))

    def _masks(self, eps: Tensor, task: Tensor | None) -> Tensor | None:
        """1 for each action dimension of [..., B, A] that the row's task has."""
        return None if task is None else self._model.action_masks[task].expand_as(eps)

    @torch.no_grad()
    def policy(self, z: Tensor, noise: UpdateNoise, scale: Tensor, batch: Batch) -> PolicyLoss:
        s, eps, tasks = self._s, noise.pi_eps, _Tasks(self._model, batch.task)
        rows, masks = tasks.beside(z), self._masks(eps, batch.task)
        prior = self._pi(*rows, keep=Keep.FOR_PARAMETERS)
        drawn = self._draw(prior.y, eps, masks)
        heads = self._model.q.picked(noise.pi_q_index)
        q = self._q(*rows, drawn.action.flatten(0, 1), keep=Keep.FOR_INPUTS, heads=heads, dropout=noise.pi_q_dropout)
        numbers = (s.rho, s.entropy_coef, s.tau)
        total, scale, of_q, of_entropy = torch.ops.specmpc.draw_loss(q.y, drawn.scaled_entropy, scale, *numbers, *self._range)

        of_action = tasks.to_action(q, of_q).view_as(drawn.action)
        if batch.demonstrated is not None:
            with torch.enable_grad():
                action = drawn.action.detach().requires_grad_()
                imitation = imitation_loss(action, batch.action, batch.demonstrated, s)
            total = total + imitation.detach()
            of_action += torch.autograd.grad(imitation, action)[0]
        tasks.back(prior, torch.ops.specmpc.draw_policy_backward(of_action, of_entropy, prior.y, eps, masks, *self._log_std_range))
        tasks.learn()
        return PolicyLoss(total, drawn.entropy.mean(), drawn.scaled_entropy.mean(), scale)


class _Tasks:
    """The embeddings of a batch's tasks, which are inputs of all networks, and the gradient that they get; nothing for a single task."""

    def __init__(self, model: WorldModel, task: Tensor | None) -> None:
        with torch.enable_grad():
            self.embedded = None if task is None else model.embedding_of(task)  # [B, D]
        self._gradient = None if self.embedded is None else torch.zeros_like(self.embedded)

    def beside(self, x: Tensor) -> list[Tensor]:
        """x [..., B, X] as rows, and its rows' embeddings: a network's first inputs."""
        rows = x.flatten(0, -2)
        return [rows] if self.embedded is None else [rows, self.embedded.expand(*x.shape[:-1], -1).flatten(0, -2)]

    def back(self, call: LearntCall, grad: Tensor) -> None:
        """A gradient goes back through a network that had such inputs, to its parameters and the embeddings."""
        self._back(call, grad, [False] * len(call.parts))

    def to_x(self, call: LearntCall, grad: Tensor) -> Tensor:
        """Likewise; → what x gets of it."""
        (of_x,) = self._back(call, grad, [True] + [False] * (len(call.parts) - 1))
        return of_x

    def to_action(self, call: LearntCall, grad: Tensor) -> Tensor:
        """Likewise; → what the action gets of it, which came last."""
        (of_action,) = self._back(call, grad, [False] * (len(call.parts) - 1) + [True])
        return of_action

    def back_through(self, rollout: LearntRollout, of_latents: Tensor) -> None:
        """Likewise, through a rollout; what latents get through later ones is added to theirs."""
        of_beside, of_parameters = rollout.gradients(of_latents)
        _learn(rollout.mlp, of_parameters)
        self._add(*of_beside)

    def learn(self) -> None:
        """The gradient goes back to the embeddings' table."""
        if self.embedded is not None:
            self.embedded.backward(self._gradient)

    def _back(self, call: LearntCall, grad: Tensor, wanted: list[bool]) -> list[Tensor]:
        if self._gradient is not None:
            wanted[1] = True
        of_parts, of_parameters = call.gradients(grad, *wanted)
        _learn(call.mlp, of_parameters)
        if self._gradient is not None:
            self._add(of_parts.pop(sum(wanted[:1])))
        return of_parts

    def _add(self, *gradients: Tensor) -> None:
        """Gradients of embeddings, [B, D] or of B rows each time."""
        for gradient in gradients:
            assert self._gradient is not None
            self._gradient += gradient.unflatten(0, (-1, len(self._gradient))).sum(0)


def _learn(mlp: LearntMlp, gradients: Sequence[Tensor]) -> None:
    """Adds to the gradients of an MLP's parameters, or nothing if there are none."""
    for parameter, gradient in zip((*mlp.weights, *mlp.vectors) if gradients else (), gradients, strict=True):
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
