"""TD-MPC2's latent world model (Hansen et al., 2024, §3): forward passes only.

Encoder, dynamics, reward, optional termination, policy prior and a Q-ensemble with its target copy. It knows no losses and no planning.

A model of several tasks has a learnt embedding of the task as one more input of every network, and masks for action dimensions that a task
does not use. It is trained as a whole; it acts as one of its members, a single-task model that computes the same (`WorldModel.member`).
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from specmpc_cli.engine import native
from specmpc_cli.engine.layers import Affine, Linear, LinearEnsemble, Mlp, SimNorm, Stack, joined
from specmpc_cli.engine.twohot import two_hot_inv

LOG_STD_RANGE = (-10.0, 2.0)  # of the policy prior


@dataclass(frozen=True, slots=True)
class WorldModelDims:
    """Every size that fixes the shapes of a world model's weights, and the ranges its outputs are coded in."""

    obs_dim: int
    action_dim: int
    latent_dim: int
    mlp_dim: int
    enc_dim: int
    num_enc_layers: int
    num_q: int
    episodic: bool = False
    num_bins: int = 101
    vmin: float = -10.0
    vmax: float = 10.0
    simnorm_dim: int = 8
    log_std_min: float = LOG_STD_RANGE[0]
    log_std_max: float = LOG_STD_RANGE[1]
    num_tasks: int = 0  # 0: a single-task model. Else obs_dim and action_dim are those of the largest task, to which the others are padded
    task_dim: int = 0


# Millions of parameters → sizes (TD-MPC2, appendix H).
MODEL_SIZES: dict[int, dict[str, int]] = {
    1: {"enc_dim": 256, "num_enc_layers": 2, "mlp_dim": 384, "latent_dim": 128, "num_q": 2},
    5: {"enc_dim": 256, "num_enc_layers": 2, "mlp_dim": 512, "latent_dim": 512, "num_q": 5},
    19: {"enc_dim": 1024, "num_enc_layers": 3, "mlp_dim": 1024, "latent_dim": 768, "num_q": 5},
    48: {"enc_dim": 1792, "num_enc_layers": 4, "mlp_dim": 1792, "latent_dim": 768, "num_q": 5},
    317: {"enc_dim": 4096, "num_enc_layers": 5, "mlp_dim": 4096, "latent_dim": 1376, "num_q": 8},
}


def model_size(dims: WorldModelDims) -> int | None:
    """Millions of parameters by TD-MPC2's table; None for sizes outside it."""
    return next((size for size, values in MODEL_SIZES.items() if all(getattr(dims, k) == v for k, v in values.items())), None)


def within_unit_ball(x: Tensor) -> Tensor:
    """Vectors [..., D], scaled down to a norm of 1 at most; the scale is a constant to gradients."""
    norm = x.detach().norm(dim=-1, keepdim=True)
    return x * torch.where(norm > 1, 1 / (norm + 1e-7), 1.0)


class QEnsemble(nn.Module):
    """`num_q` value heads with stacked weights: [z, a] → bin logits."""

    def __init__(self, num_q: int, in_dim: int, hidden: int, num_bins: int) -> None:
        super().__init__()
        self.num_q = num_q
        self.layers = Stack(
            [
                LinearEnsemble(num_q, in_dim, hidden, normed=True),
                LinearEnsemble(num_q, hidden, hidden, normed=True),
                LinearEnsemble(num_q, hidden, num_bins, normed=False),
            ]
        )

    def logits(self, x: Tensor, head: int | Tensor | None, mask: Tensor | None = None) -> Tensor:
        """x [B, N, Z+A] → [B, N, bins] of one head: the same for all rows, or one per row [B]. None: [1, N, Z+A] → all heads, [E, N, bins].

        `mask` multiplies the first layer's features (dropout, while training).
        """
        if self.layers.packed is not None:
            assert mask is None, "dropout is for learning"
            return self.layers.packed(x, head=head)
        first, *rest = self.layers
        x = first(x, head, mask)
        for layer in rest:
            x = layer(x, head)
        return x

    def of_rows(self, x: Tensor, a: Tensor, q_index: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x [..., Z], a [..., A] → logits [G, ..., bins] of the heads q_index [G], or of all. `mask` as in `logits`, for all N rows."""
        heads = self.picked(q_index)
        za = torch.cat([x, a], dim=-1)
        rows = za.flatten(0, -2)
        logits = self.logits(rows.unsqueeze(0) if heads is None else rows.expand(len(heads), -1, -1), heads, mask)
        return logits.unflatten(1, za.shape[:-1])

    def picked(self, q_index: Tensor | None) -> Tensor | None:
        """The heads that were drawn; None means all: with two in all, a draw of two changes nothing."""
        return None if self.num_q == 2 else q_index


class WorldModel(nn.Module):
    """The networks of one task, or of a task set. Leading axes are free unless a shape is given; results are fp32.

    `task` [B] (int64) is given to models of a task set and only to them; B is then the last leading axis of the other inputs.
    """

    action_masks: Tensor  # [tasks, A], of a task set only

    def __init__(self, dims: WorldModelDims) -> None:
        super().__init__()
        self.dims = d = dims
        self.packed = False  # whether what plans is packed
        simnorm = SimNorm(d.simnorm_dim)
        hidden = [d.mlp_dim, d.mlp_dim]
        z = d.latent_dim + d.task_dim
        za = z + d.action_dim
        self.encoder = Mlp(d.obs_dim + d.task_dim, [d.enc_dim] * max(d.num_enc_layers - 1, 1), d.latent_dim, simnorm)
        self.dynamics = Mlp(za, hidden, d.latent_dim, simnorm)
        self.reward_net = Mlp(za, hidden, d.num_bins)
        self.termination_net = Mlp(z, hidden, 1) if d.episodic else None
        self.pi_net = Mlp(z, hidden, 2 * d.action_dim)
        self.q = QEnsemble(d.num_q, za, d.mlp_dim, d.num_bins)
        self.q_target = QEnsemble(d.num_q, za, d.mlp_dim, d.num_bins).requires_grad_(False)
        self.task_emb: nn.Embedding | None = None
        if d.num_tasks:
            self.task_emb = nn.Embedding(d.num_tasks, d.task_dim)
            nn.init.uniform_(self.task_emb.weight, -0.02, 0.02)
            self.register_buffer("action_masks", torch.ones(d.num_tasks, d.action_dim))  # 1.0 where a task has that action dimension
        self._zero_last_layers()

    def _zero_last_layers(self) -> None:
        """Reward and Q start at zero, as in the paper's appendix; the target starts as a copy."""
        for last in (self.reward_net[-1], self.q.layers[-1]):
            assert isinstance(last, Linear | LinearEnsemble)
            nn.init.zeros_(last.weight)
        self.q_target.load_state_dict(self.q.state_dict())

    def with_task(self, x: Tensor, task: Tensor | None) -> Tensor:
        """x [..., B, X] and the embedding of its rows' tasks → [..., B, X + task_dim]; x itself for a single task."""
        if self.task_emb is None:
            return x
        assert task is not None, "a model of a task set needs to know the task"
        return torch.cat([x, self.embedding_of(task).expand(*x.shape[:-1], -1)], dim=-1)

    def embedding_of(self, task: Tensor) -> Tensor:
        """Embeddings [..., D], as the official nn.Embedding(max_norm=1) looks them up."""
        assert self.task_emb is not None
        return within_unit_ball(self.task_emb(task))

    def mask_action(self, x: Tensor, task: Tensor | None) -> Tensor:
        """x [..., B, A] with zeros in the action dimensions that its rows' tasks do not have."""
        return x if self.task_emb is None else x * self.action_masks[task]

    def encode(self, obs: Tensor, task: Tensor | None = None) -> Tensor:
        """Observation [..., O] → latent [..., Z].

        The layer that reads observations multiplies in fp32 even under autocast: a sensor's offset would swallow bf16's eight digits.
        """
        first, *others = self.encoder
        device = obs.device.type
        # Nothing is switched off that is not on: a graph that switches autocast is one that the compiler's cache refuses to keep whole.
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            x = first(self.with_task(obs, task))
        for layer in others:
            x = layer(x)
        return x

    def next(self, z: Tensor, a: Tensor, task: Tensor | None = None) -> Tensor:
        """Latent and action → predicted next latent [..., Z]. One z [..., 1, Z] may serve many actions [..., N, A]."""
        return self.dynamics(self.with_task(z, task), a)

    def reward(self, z: Tensor, a: Tensor) -> Tensor:
        """Expected reward of one env step, [...]. One z [..., 1, Z] may serve many actions [..., N, A]."""
        packed = self.reward_net.packed
        return self.decode(self.reward_net(z, a)) if packed is None else packed(*joined(z, a), expect=self._range)

    def terminates(self, z: Tensor) -> Tensor:
        """1.0 where the model says that the episode ended at z, else 0.0, [...]. All 0 without a termination head."""
        if self.termination_net is None:
            return z.new_zeros(z.shape[:-1])
        return (self.termination_net(z).squeeze(-1) > 0.0).float()  # sigmoid(x) > 0.5

    def pi(self, z: Tensor, task: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Policy prior before squashing: mean and log-std, each [..., A], both 0 in action dimensions that the task does not have."""
        mean, log_std = self.pi_net(self.with_task(z, task)).chunk(2, dim=-1)
        low, high = self.dims.log_std_min, self.dims.log_std_max
        log_std = low + 0.5 * (high - low) * (torch.tanh(log_std) + 1.0)
        return self.mask_action(mean, task), self.mask_action(log_std, task)

    def pi_mean(self, z: Tensor) -> Tensor:
        """The policy prior's squashed mean [..., A]: its deterministic action."""
        return torch.tanh(self.pi(z)[0])

    def pi_sample(self, z: Tensor, eps: Tensor, task: Tensor | None = None) -> Tensor:
        """A squashed draw of the policy prior [..., A] for standard normal eps [..., A]."""
        mean, log_std = self.pi(z, task)
        return torch.tanh(mean + self.mask_action(eps, task) * torch.exp(log_std))

    def q_pair(self, z: Tensor, a: Tensor, q_index: Tensor) -> Tensor:
        """Mean value of two drawn Q-heads. z [B, N, Z], a [B, N, A], q_index [B, 2] → [B, N].

        Only the two heads are evaluated (the official code evaluates all and then selects). With two heads in all, the
        draw changes nothing, so the weights stay constants, which the compiler can pack once. On a GPU both are one batched product.
        """
        x = torch.cat([z, a], dim=-1)
        if x.is_cuda:
            return self.values_at_once(x, q_index).mean(1)
        heads: tuple[int | Tensor, ...] = (0, 1) if self.q.num_q == 2 else (q_index[:, 0], q_index[:, 1])
        first, second = (self._value(x, head) for head in heads)
        return (first + second) / 2

    def _value(self, x: Tensor, head: int | Tensor) -> Tensor:
        """Values [B, N] of one head, or one for each of B, at x [B, N, Z+A]."""
        packed = self.q.layers.packed
        return self.decode(self.q.logits(x, head)) if packed is None else packed(x, head=head, expect=self._range)

    def values_at_once(self, x: Tensor, q_index: Tensor) -> Tensor:
        """Values [B, 2, N] of the two heads q_index [B, 2] at x [B, N, Z+A]."""
        if self.q.num_q == 2:
            logits = self.q.logits(x.flatten(0, 1).unsqueeze(0), None)  # [2, B·N, bins]
            return self.decode(logits).unflatten(1, x.shape[:2]).transpose(0, 1)
        twice = x.unsqueeze(1).expand(-1, 2, -1, -1).flatten(0, 1)  # [2B, N, Z+A]
        return self.decode(self.q.logits(twice, q_index.flatten())).unflatten(0, q_index.shape)

    def decode(self, logits: Tensor) -> Tensor:
        """Bin logits [..., bins] → scalar [...]."""
        return two_hot_inv(logits, *self._range)

    @property
    def _range(self) -> tuple[float, float]:
        """That bins code, in symlog space."""
        return self.dims.vmin, self.dims.vmax

    def member(self, index: int, obs_dim: int, action_dim: int) -> WorldModel:
        """The single-task model of one task of this model's task set; a model that computes the same.

        A constant embedding shifts each first layer by a constant, so it is folded into that layer's bias; the padding of observations
        (obs_dim of ours are real) and actions is cut off.
        """
        d = self.dims
        assert self.task_emb is not None and index < d.num_tasks and obs_dim <= d.obs_dim and action_dim <= d.action_dim, (index, d)
        embedding = self.embedding_of(torch.tensor(index)).detach()
        single = WorldModel(replace(d, obs_dim=obs_dim, action_dim=action_dim, num_tasks=0, task_dim=0))
        state = {name: value for name, value in self.state_dict().items() if name in single.state_dict()}
        for name in state:
            net, layer, part = name.rsplit(".", 2)
            if layer != "0" or part != "weight":
                continue
            shared, kept = (d.obs_dim, obs_dim) if net == "encoder" else (d.latent_dim, d.latent_dim)
            weight, after = state[name], shared + d.task_dim  # inputs are [x, embedding, action]
            state[f"{net}.0.bias"] = state[f"{net}.0.bias"] + weight[..., shared:after] @ embedding
            state[name] = torch.cat([weight[..., :kept], weight[..., after : after + action_dim]], dim=-1)
        for part in ("weight", "bias"):
            last = f"pi_net.{len(self.pi_net) - 1}.{part}"  # means, then log-stds
            state[last] = state[last].unflatten(0, (2, d.action_dim))[:, :action_dim].flatten(0, 1)
        single.load_state_dict(state)
        return single

    def compute_copy(self, dtype: torch.dtype) -> WorldModel:
        """A frozen copy whose matrix products run in `dtype`; LayerNorm parameters stay fp32. `take_weights` renews its weights.

        For int8 weights stay fp32 until they are packed.

        For bf16 on a GPU weights are padded to multiples of eight, which its matrix units need at full speed.
        """
        assert not self.packed, "a packed model's parameters may be old"
        twin = copy.deepcopy(self).requires_grad_(False).eval()
        stored = torch.float32 if dtype is torch.int8 else dtype
        on_gpu = next(self.parameters()).is_cuda
        for layer in twin.modules():
            if isinstance(layer, Affine):
                layer.weight.data = layer.weight.data.to(stored)
                layer.bias.data = layer.bias.data.to(stored)
                if on_gpu and dtype is torch.bfloat16:
                    layer.pad(8)
        return twin

    def _planning_nets(self) -> list[Stack]:
        nets = (self.dynamics, self.reward_net, self.termination_net, self.pi_net, self.q.layers)
        return [net for net in nets if net is not None]

    @torch.inference_mode(False)
    def pack(self, int8: bool = False) -> None:
        """From now on what plans is computed by kernels of our own, without gradients, in 8 bits if so wanted.

        Nothing changes where there are none for its device and dtype.

        Raises:
            ConfigError: there are none for 8 bits.
        """
        weight = next(self.dynamics.parameters())
        if int8:
            native.require_int8()
        self.packed = int8 or (weight.device.type == "cpu" and native.multiplies(weight.dtype))
        for net in self._planning_nets() if self.packed else []:
            net.pack(int8, self.dims.latent_dim)

    @torch.no_grad()
    def take_weights(self, source: WorldModel) -> None:
        """Copies another model's weights into this one, which may be a `compute_copy` of it.

        One that is packed takes what plans, and as packed alone: its parameters, and what else is made of them, stay what they were.
        """
        assert not source.packed, "a packed model's parameters may be old"
        if self.packed:
            for mine, theirs in zip(self._planning_nets(), source._planning_nets(), strict=True):
                mine.repack(theirs)
            return
        given: list[Tensor] = list(source.parameters())
        inner = [_corner(mine, theirs.shape) for mine, theirs in zip(self.parameters(), given, strict=True)]
        torch._foreach_copy_(inner, given)


def _corner(padded: Tensor, shape: torch.Size) -> Tensor:
    """The part of a tensor that is not padding."""
    return padded if padded.shape == shape else padded[tuple(map(slice, shape))]
