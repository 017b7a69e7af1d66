"""The same algorithm the way the official code computes it, as the yardstick of `specmpc bench`.

fp32, eager, one environment at a time; every Q-head is evaluated before two are chosen, through `torch.vmap` over stacked parameters;
losses are summed step by step and head by head; nothing is shared, fused or skipped. It uses the same draws as the fast path and gives the
same numbers, which the tests check: a second, independent implementation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specmpc_cli.engine.layers import Linear, LinearEnsemble, Mlp, NormedLinear
from specmpc_cli.engine.planner import PlannerNoise, PlannerSettings
from specmpc_cli.engine.world_model import QEnsemble, WorldModel
from specmpc_cli.learning.learner import LearnerSettings
from specmpc_cli.learning.losses import Batch, LossSettings, UpdateNoise


class _SimNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(x.view(*x.shape[:-1], -1, 8), dim=-1).view(x.shape)


def _layer(weight: Tensor, bias: Tensor, norm: tuple[Tensor, Tensor] | None, activation: nn.Module, dropout: float = 0.0) -> nn.Sequential:
    """A copy of one layer, of torch's own modules: linear, dropout if any; LayerNorm (scale, shift) and activation where it has them."""
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.load_state_dict({"weight": weight, "bias": bias})
    parts: list[nn.Module] = [linear, nn.Dropout(dropout)] if dropout else [linear]
    if norm is not None:
        layer_norm = nn.LayerNorm(weight.shape[0])
        layer_norm.load_state_dict({"weight": norm[0], "bias": norm[1]})
        parts += [layer_norm, activation]
    return nn.Sequential(*parts)


def _mlp(net: Mlp, last: nn.Module | None = None) -> nn.Sequential:
    """A copy of one of our networks; `last` is the last layer's activation."""
    layers = []
    for index, layer in enumerate(net):
        assert isinstance(layer, Linear)
        norm = (layer.ln.weight, layer.ln.bias) if isinstance(layer, NormedLinear) else None
        activation = last if last is not None and index == len(net) - 1 else nn.Mish()
        layers.append(_layer(layer.weight, layer.bias, norm, activation))
    return nn.Sequential(*layers)


class _Heads(nn.Module):
    """All Q-heads at once, by torch.vmap over their stacked parameters."""

    def __init__(self, heads: list[nn.Module]) -> None:
        super().__init__()
        parameters, _ = torch.func.stack_module_state(heads)
        self.stacked = nn.ParameterDict({name.replace(".", "/"): value.detach().clone() for name, value in parameters.items()})
        template = [heads[0]]  # in a list, so that its parameters are not ours

        def call(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(template[0], parameters, (x,))

        self._call = torch.vmap(call, (0, None), randomness="different")

    def forward(self, x: Tensor, detach: bool = False) -> Tensor:
        """x [..., Z+A] → logits [E, ..., bins]."""
        stacked = {name.replace("/", "."): value.detach() if detach else value for name, value in self.stacked.items()}
        return self._call(stacked, x)


def _heads(ensemble: QEnsemble, dropout: float) -> _Heads:
    heads: list[nn.Module] = []
    for head in range(ensemble.num_q):
        layers = []
        for index, layer in enumerate(ensemble.layers):
            assert isinstance(layer, LinearEnsemble)
            norm = None if layer.ln is None else (layer.ln.weight[head], layer.ln.bias[head])
            layers.append(_layer(layer.weight[head], layer.bias[head], norm, nn.Mish(), dropout if index == 0 else 0.0))
        heads.append(nn.Sequential(*layers))
    return _Heads(heads)


class PlainModel(nn.Module):
    """A single-task world model with a copy of another's weights."""

    def __init__(self, model: WorldModel, dropout: float = 0.0) -> None:
        super().__init__()
        self.dims = d = model.dims
        self.encoder, self.dynamics = _mlp(model.encoder, _SimNorm()), _mlp(model.dynamics, _SimNorm())
        self.reward, self.pi_net = _mlp(model.reward_net), _mlp(model.pi_net)
        self.termination = None if model.termination_net is None else _mlp(model.termination_net)
        self.q, self.q_target = _heads(model.q, dropout), _heads(model.q_target, 0.0)
        self.q_target.requires_grad_(False)
        self.register_buffer("bins", torch.linspace(d.vmin, d.vmax, d.num_bins))

    bins: Tensor

    def next(self, z: Tensor, action: Tensor) -> Tensor:
        return self.dynamics(torch.cat([z, action], dim=-1))

    def reward_logits(self, z: Tensor, action: Tensor) -> Tensor:
        return self.reward(torch.cat([z, action], dim=-1))

    def pi(self, z: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Squashed action [..., A], its entropy and the scaled entropy [..., 1]; all three are computed even where one is used."""
        mean, log_std = self.pi_net(z).chunk(2, dim=-1)
        low, high = self.dims.log_std_min, self.dims.log_std_max
        log_std = low + 0.5 * (high - low) * (torch.tanh(log_std) + 1)
        gaussian = (-0.5 * eps.pow(2) - log_std - 0.9189385175704956).sum(-1, keepdim=True)
        action = torch.tanh(mean + eps * log_std.exp())
        log_prob = gaussian - torch.log(F.relu(1 - action.pow(2)) + 1e-6).sum(-1, keepdim=True)
        return action, -log_prob, -gaussian * eps.shape[-1]

    def decode(self, logits: Tensor) -> Tensor:
        """Bin logits [..., bins] → scalar [..., 1]."""
        x = (F.softmax(logits, dim=-1) * self.bins).sum(-1, keepdim=True)
        return torch.sign(x) * (torch.exp(torch.abs(x)) - 1)

    def cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        """Bin logits [N, bins] against the two-hot coding of scalars [N, 1] → [N, 1]; the coding is scattered into zeros."""
        d = self.dims
        x = torch.clamp(torch.sign(target) * torch.log(1 + torch.abs(target)), d.vmin, d.vmax).squeeze(1)
        position = (x - d.vmin) / ((d.vmax - d.vmin) / (d.num_bins - 1))
        below = torch.floor(position)
        share = (position - below).unsqueeze(-1)
        coded = torch.zeros(target.shape[0], d.num_bins, dtype=target.dtype, device=target.device)
        index = below.long()
        coded = coded.scatter(1, index.unsqueeze(1), 1 - share)
        coded = coded.scatter(1, (index.unsqueeze(1) + 1) % d.num_bins, share)
        return -(coded * F.log_softmax(logits, dim=-1)).sum(-1, keepdim=True)

    def chosen_values(self, heads: _Heads, z: Tensor, action: Tensor, chosen: Tensor, detach: bool = False) -> Tensor:
        """Values [2, ..., 1] of two heads; the logits of all heads are computed first."""
        return self.decode(heads(torch.cat([z, action], dim=-1), detach)[chosen])


@torch.no_grad()
def plain_plan(
    model: PlainModel, obs: Tensor, previous_mean: Tensor | None, noise: PlannerNoise, s: PlannerSettings
) -> tuple[Tensor, Tensor]:
    """One plan for one environment: obs [1, O] → first action [A] and mean [H, A]. `noise` has one row."""
    horizon, prior_count = s.horizon, s.num_pi_trajs
    action_dim = model.dims.action_dim
    z = model.encoder(obs)
    actions = torch.empty(horizon, s.num_samples, action_dim, device=obs.device)
    imagined = z.repeat(prior_count, 1)
    for t in range(horizon):
        actions[t, :prior_count] = model.pi(imagined, noise.prior_eps[0, :, t])[0]
        if t < horizon - 1:
            imagined = model.next(imagined, actions[t, :prior_count])

    z = z.repeat(s.num_samples, 1)
    mean = torch.zeros(horizon, action_dim, device=obs.device)
    std = torch.full((horizon, action_dim), s.max_std, device=obs.device)
    if previous_mean is not None:
        mean[:-1] = previous_mean[1:]
    score = elites = None
    for i in range(s.iterations):
        drawn = mean.unsqueeze(1) + std.unsqueeze(1) * noise.sample_eps[0, i].transpose(0, 1)
        actions[:, prior_count:] = drawn.clamp(-1, 1)
        value = _plain_value(model, z, actions, noise.terminal_eps[0, i], noise.q_index[0, i], s.discount).nan_to_num(0)
        best = torch.topk(value.squeeze(1), s.num_elites, dim=0).indices
        elite_value, elites = value[best], actions[:, best]
        score = torch.exp(s.temperature * (elite_value - elite_value.max(0).values))
        score = score / score.sum(0)
        mean = (score.unsqueeze(0) * elites).sum(dim=1) / (score.sum(0) + 1e-9)
        std = ((score.unsqueeze(0) * (elites - mean.unsqueeze(1)) ** 2).sum(dim=1) / (score.sum(0) + 1e-9)).sqrt()
        std = std.clamp(s.min_std, s.max_std)
    assert score is not None and elites is not None, "a plan needs at least one iteration"
    drawn = (torch.log(score.squeeze(1)) - torch.log(noise.exponential[0])).argmax()
    return elites[0, drawn].clamp(-1, 1), mean


def _plain_value(model: PlainModel, z: Tensor, actions: Tensor, eps: Tensor, chosen: Tensor, discount: float) -> Tensor:
    total, weight = torch.zeros(z.shape[0], 1, device=z.device), 1.0
    ended = torch.zeros_like(total)
    for action in actions:
        reward = model.decode(model.reward_logits(z, action))
        z = model.next(z, action)
        total = total + weight * (1 - ended) * reward
        weight *= discount
        if model.termination is not None:
            ended = torch.clip(ended + (torch.sigmoid(model.termination(z)) > 0.5).float(), max=1)
    action = model.pi(z, eps)[0]
    return total + weight * (1 - ended) * model.chosen_values(model.q, z, action, chosen).sum(0) / 2


class PlainLearner:
    """Updates of a `PlainModel`, as the official code makes them: Adam without fusion, gradients clipped over all parameters."""

    def __init__(self, model: PlainModel, losses: LossSettings, settings: LearnerSettings) -> None:
        self.model, self._losses, self._settings = model.train(), losses, settings
        self.scale = torch.ones((), device=model.bins.device)
        named = dict(model.named_parameters())
        encoder = list(model.encoder.parameters())
        rest = [value for name, value in named.items() if not name.startswith(("encoder.", "pi_net.", "q_target."))]
        groups = [{"params": encoder, "lr": settings.lr * settings.enc_lr_scale}, {"params": rest}]
        self._adam = torch.optim.Adam(groups, lr=settings.lr)
        self._pi_adam = torch.optim.Adam(model.pi_net.parameters(), lr=settings.lr, eps=settings.pi_adam_eps)

    def step(self, batch: Batch, noise: UpdateNoise) -> tuple[float, float]:
        """One update; → both losses, as numbers, because the official code reads them after each update."""
        model, s = self.model, self._losses
        horizon, size = batch.reward.shape
        with torch.no_grad():
            seen = model.encoder(batch.obs[1:])
            action = model.pi(seen, noise.td_eps)[0]
            value = model.chosen_values(model.q_target, seen, action, noise.td_q_index).min(0).values
            target = batch.reward.unsqueeze(-1) + s.discount * (1 - batch.terminated.unsqueeze(-1)) * value

        z = model.encoder(batch.obs[0])
        latents = torch.empty(horizon + 1, size, model.dims.latent_dim, device=z.device)
        latents[0] = z
        consistency = torch.zeros((), device=z.device)
        for t in range(horizon):
            z = model.next(z, batch.action[t])
            consistency = consistency + F.mse_loss(z, seen[t]) * s.rho**t
            latents[t + 1] = z
        logits = model.q(torch.cat([latents[:-1], batch.action], dim=-1))
        reward_logits = model.reward_logits(latents[:-1], batch.action)
        reward_loss, value_loss = torch.zeros_like(consistency), torch.zeros_like(consistency)
        for t in range(horizon):
            reward_loss = reward_loss + model.cross_entropy(reward_logits[t], batch.reward[t].unsqueeze(-1)).mean() * s.rho**t
            for head in logits[:, t]:
                value_loss = value_loss + model.cross_entropy(head, target[t]).mean() * s.rho**t
        total = (
            s.consistency_coef * consistency / horizon
            + s.reward_coef * reward_loss / horizon
            + s.value_coef * value_loss / (horizon * model.dims.num_q)
        )
        if model.termination is not None:
            ended = torch.sigmoid(model.termination(latents[1:])).squeeze(-1)
            total = total + s.termination_coef * F.binary_cross_entropy(ended, batch.terminated)
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), self._settings.grad_clip_norm)
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)

        pi_loss = self._update_policy(latents.detach(), noise)
        with torch.no_grad():
            for target_weight, weight in zip(model.q_target.parameters(), model.q.parameters(), strict=True):
                target_weight.lerp_(weight, s.tau)
        return total.item(), pi_loss

    def _update_policy(self, latents: Tensor, noise: UpdateNoise) -> float:
        model, s = self.model, self._losses
        action, _, scaled_entropy = model.pi(latents, noise.pi_eps)
        value = model.chosen_values(model.q, latents, action, noise.pi_q_index, detach=True).sum(0) / 2
        bounds = torch.quantile(value[0].detach().flatten(), torch.tensor([0.05, 0.95], device=value.device))
        self.scale.lerp_((bounds[1] - bounds[0]).clamp(min=1.0), s.tau)
        weight = torch.pow(s.rho, torch.arange(len(value), device=value.device))
        loss = (-(s.entropy_coef * scaled_entropy + value / self.scale).mean(dim=(1, 2)) * weight).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.pi_net.parameters(), self._settings.grad_clip_norm)
        self._pi_adam.step()
        self._pi_adam.zero_grad(set_to_none=True)
        return loss.item()
