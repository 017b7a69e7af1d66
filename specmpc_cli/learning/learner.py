"""The world model's learner: one update of all networks per call (TD-MPC2, algorithm 2). Knows no environments and no replay.

An update is a pure function of the learner's state, a batch and the update's number: its draws come from torch's default generator of its
device, the only one that is seeded with (seed, number) first. That is what lets training resume bit for bit from the number alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from specmpc_cli.engine.captured import CapturedCall
from specmpc_cli.engine.native.learnt_mlp import Dropout
from specmpc_cli.engine.world_model import WorldModel, within_unit_ball
from specmpc_cli.learning.gradients import Gradients, gradients_for
from specmpc_cli.learning.losses import Batch, LossSettings, UpdateNoise
from specmpc_cli.learning.optimiser import ClippedAdam
from specmpc_cli.runtime import Runtime


@dataclass(frozen=True, slots=True)
class LearnerSettings:
    """The optimisers' numbers (TD-MPC2, appendix H)."""

    lr: float = 3e-4
    enc_lr_scale: float = 0.3
    pi_adam_eps: float = 1e-5
    grad_clip_norm: float = 20.0
    dropout: float = 0.01  # share of the features dropped in the first layer of each Q-head


class UpdateInfo(NamedTuple):
    """What one update reports, each a scalar tensor on the learner's device."""

    consistency_loss: Tensor
    reward_loss: Tensor
    value_loss: Tensor
    termination_loss: Tensor
    total_loss: Tensor
    grad_norm: Tensor
    pi_loss: Tensor
    pi_grad_norm: Tensor
    pi_entropy: Tensor
    pi_scaled_entropy: Tensor
    pi_scale: Tensor


class Learner:
    """Optimises a world model in place: world model, then policy prior, then the target heads."""

    def __init__(
        self,
        model: WorldModel,
        losses: LossSettings,
        settings: LearnerSettings,
        runtime: Runtime,
        *,
        seed: int,
        discounts: Sequence[float] | None = None,
        demonstrated: bool = False,
    ) -> None:
        """
        Args:
            discounts: one per task, for models of a task set.
            demonstrated: batches say which of their slices are demonstrations.
        """
        assert (discounts is not None) == (model.task_emb is not None), "a model of a task set has one discount per task"
        self._discounts = None if discounts is None else torch.tensor(discounts, device=runtime.device)
        self.model = model.to(runtime.device).train()
        self.updates = 0
        self.scale = torch.ones((), device=runtime.device)
        self._losses, self._settings, self._runtime, self._seed = losses, settings, runtime, seed
        self._gradients: Gradients | None = None  # chosen when they are first computed, because kernels may have to be built for them
        model.requires_grad_(True).q_target.requires_grad_(False)
        policy = list(model.pi_net.parameters())
        encoder = list(model.encoder.parameters())
        named = [(name, parameter) for name, parameter in model.named_parameters() if not name.startswith(("pi_net.", "q_target."))]
        rest = [parameter for name, parameter in named if not name.startswith("encoder.")]
        groups = [{"params": encoder, "lr": settings.lr * settings.enc_lr_scale}, {"params": rest}]
        graph = runtime.device.type == "cuda"
        by_kernel = runtime.compiled and not graph
        adam = partial(ClippedAdam, lr=settings.lr, max_norm=settings.grad_clip_norm, by_kernel=by_kernel, capturable=graph)
        self._world_adam, self._policy_adam = adam(groups), adam([{"params": policy}], eps=settings.pi_adam_eps)
        self._heads: list[Tensor] = list(model.q.parameters())
        self._targets: list[Tensor] = list(model.q_target.parameters())
        self._embedding = None if model.task_emb is None else TaskEmbedding(model.task_emb.weight)
        optional = {"task": self._embedding is not None, "demonstrated": demonstrated}
        self._fields = [name for name in Batch._fields if optional.get(name, True)]  # that batches have
        self._call = CapturedCall(self._drawn_step, runtime.device)
        # Of this device alone: torch.manual_seed queues the seed for every kind of device that is not there, which takes a millisecond.
        self._generator = torch.cuda.default_generators[self.scale.device.index] if graph else torch.default_generator

    def update(self, batch: Batch) -> UpdateInfo:
        """Update number `updates`, with draws keyed by (seed, number). On CUDA the third one of a process captures a graph."""
        self._generator.manual_seed(update_key(self._seed, self.updates))
        info = self._call(*(getattr(batch, name) for name in self._fields))
        self.updates += 1
        return info

    def rehearse(self, size: int, horizon: int) -> None:
        """Computes both losses and their gradients for an empty batch, which builds or compiles what they need; nothing is learned."""
        d, device = self.model.dims, self._runtime.device
        steps = torch.zeros(horizon, size, device=device)
        batch = Batch(
            torch.zeros(horizon + 1, size, d.obs_dim, device=device),
            torch.zeros(horizon, size, d.action_dim, device=device),
            steps,
            torch.zeros_like(steps),  # no alias: to the compiler that would be another function
            torch.zeros(size, dtype=torch.int64, device=device) if "task" in self._fields else None,
            torch.zeros(size, device=device) if "demonstrated" in self._fields else None,
        )
        noise = self.draw(horizon, size)
        gradients = self._chosen_gradients()
        gradients.policy(gradients.world_model(batch, noise).latents, noise, self.scale, batch)
        self._forget_gradients()

    def _forget_gradients(self) -> None:
        for optimiser in (self._world_adam, self._policy_adam):
            optimiser.forget_gradients()

    def compute_eagerly(self) -> None:
        """Gives up compiled code, and kernels of our own."""
        self._runtime, self._gradients = replace(self._runtime, compiled=False), None
        for optimiser in (self._world_adam, self._policy_adam):
            optimiser.by_kernel = False

    def _chosen_gradients(self) -> Gradients:
        self._gradients = self._gradients or gradients_for(self.model, self._losses, self._discounts, self._runtime)
        return self._gradients

    def _drawn_step(self, *fields: Tensor) -> UpdateInfo:
        batch = Batch(**dict(zip(self._fields, fields, strict=True)))
        return self.step(batch, self.draw(*batch.reward.shape))

    def draw(self, horizon: int, size: int) -> UpdateNoise:
        """An update's draws, all from the default generator of the learner's device."""
        d, device, dropout = self.model.dims, self._runtime.device, self._settings.dropout
        return UpdateNoise(
            td_eps=torch.randn(horizon, size, d.action_dim, device=device),
            td_q_index=torch.rand(d.num_q, device=device).argsort()[:2],
            pi_eps=torch.randn(horizon + 1, size, d.action_dim, device=device),
            pi_q_index=torch.rand(d.num_q, device=device).argsort()[:2],
            q_dropout=draw_dropout((d.num_q, horizon * size, d.mlp_dim), dropout, device),
            pi_q_dropout=draw_dropout((2, (horizon + 1) * size, d.mlp_dim), dropout, device),
        )

    def step(self, batch: Batch, noise: UpdateNoise) -> UpdateInfo:
        """One update with these draws."""
        gradients = self._chosen_gradients()
        self._forget_gradients()  # of a capture that failed half-way
        # World model.
        if self._embedding is not None:
            self._embedding.restore_gradient()
            self._embedding.bound(batch.task)
        loss = gradients.world_model(batch, noise)
        grad_norm = self._world_adam.clipped_step()

        # Policy prior.
        if self._embedding is not None:
            self._embedding.bound(batch.task)
        policy = gradients.policy(loss.latents, noise, self.scale, batch)
        pi_grad_norm = self._policy_adam.clipped_step()
        self.scale.copy_(policy.scale)
        if self._embedding is not None:
            self._embedding.carry_gradient()

        # Target heads.
        with torch.no_grad():
            torch._foreach_lerp_(self._targets, self._heads, self._losses.tau)
        return UpdateInfo(
            loss.consistency,
            loss.reward,
            loss.value,
            loss.termination,
            loss.total,
            grad_norm,
            policy.total,
            pi_grad_norm,
            policy.entropy,
            policy.scaled_entropy,
            policy.scale,
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Everything but the number of updates that the next update depends on, as named tensors."""
        state = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for name, moments in self._moments():
            state |= {f"{name}.{key}": value for key, value in moments.items()}
        if self._embedding is not None:
            state["task_emb.carried"] = self._embedding.carried
        return state | {"scale": self.scale}

    def load_state_dict(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Continues after `updates` updates. Raises KeyError or RuntimeError for a state of another model."""
        self.model.load_state_dict({name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")})
        self.scale.copy_(state["scale"])
        if self._embedding is not None:
            self._embedding.carried.copy_(state["task_emb.carried"])
        self.updates = updates
        if updates:
            for optimiser in (self._world_adam, self._policy_adam):
                optimiser.begin()
            for name, moments in self._moments():
                for key, value in moments.items():
                    value.copy_(state[f"{name}.{key}"])

    def _moments(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Adam's state of each parameter: step, exp_avg, exp_avg_sq."""
        for name, parameter in self.model.named_parameters():
            optimiser = self._policy_adam if name.startswith("pi_net.") else self._world_adam
            if parameter in optimiser.state:
                yield f"adam.{name}", optimiser.state[parameter]


class TaskEmbedding:
    """What the official code does to the task embedding beside Adam's steps, in a form that graphs can capture and checkpoints can hold.

    It clears the embedding's gradient only between the two losses, so the policy loss's part of it enters the next update.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        self.carried = torch.zeros_like(weight, requires_grad=False)  # [tasks, D] the policy loss's gradient in the last update

    @torch.no_grad()
    def bound(self, task: Tensor | None) -> None:
        """Scales the rows of these tasks [B] down to a norm of 1 at most, as looking them up does in nn.Embedding(max_norm=1)."""
        assert task is not None, "a model of a task set learns from batches that name the task"
        looked_up = torch.zeros(len(self._weight), 1, dtype=torch.bool, device=task.device).index_fill_(0, task, True)
        self._weight.copy_(torch.where(looked_up, within_unit_ball(self._weight), self._weight))

    def restore_gradient(self) -> None:
        self._weight.grad = self.carried.clone()

    def carry_gradient(self) -> None:
        assert self._weight.grad is not None
        self.carried.copy_(self._weight.grad)
        self._weight.grad = None


def draw_dropout(shape: tuple[int, ...], share: float, device: torch.device) -> Dropout | None:
    """Each feature is dropped with probability `share`; None without dropout.

    Draws only the gaps between zeros, which are geometric: at a share of 0.01 that is 20 times faster than a draw per element.
    """
    if share == 0:
        return None
    count = math.prod(shape)
    expected = count * share
    draws = int(expected + 8 * math.sqrt(expected)) + 8  # together they span all elements, but for a chance of 1e-15
    gaps = torch.empty(draws, device=device).geometric_(share)
    zeros = (gaps.long().cumsum(0) - 1).clamp(max=count)
    return Dropout(zeros, shape, share)


def update_key(seed: int, number: int) -> int:
    """The 63-bit seed of an update's draws."""
    digest = hashlib.blake2b(f"update/{seed}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
