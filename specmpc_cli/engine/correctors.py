"""Correctors: small networks distilled from the planner. They look at one step and propose a residual on the planned action.

`ResidualCorrector`s compare the plan with reality and differ in how they read the mismatch: `TwoTowerCorrector` encodes real and predicted
latent separately and fuses them, `TemporalTransformerCorrector` attends over the last W mismatch features. `DistilledPolicy` looks at the
real latent alone: plain distillation of the planner, the control that the others must beat, and the only one that can act without a plan.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specmpc_cli.engine.native import MISH, PLAIN
from specmpc_cli.engine.packed import PackedMlp
from specmpc_cli.types import Visit


@dataclass(frozen=True, slots=True)
class CorrectorDims:
    """What a corrector's network is built from; all but `oldest_age` and `dropout` fix the shapes of its weights."""

    latent_dim: int
    action_dim: int
    width: int
    history: int  # W
    layers: int = 2  # Transformer layers; the two-tower has one hidden layer per tower and two after the fusion
    heads: int = 4
    max_age: int = 32  # ages have embeddings up to here
    # In the data it was fitted to: older plans count as this old, for embeddings beyond were never fitted. Files of before have 20.
    oldest_age: int = 20
    dropout: float = 0.2  # while fitting: without it the training error falls to a third of the validation error


class _Normed(nn.Sequential):
    """Linear → LayerNorm → Mish → dropout."""

    def __init__(self, in_dim: int, out_dim: int, dropout: float) -> None:
        super().__init__(nn.Linear(in_dim, out_dim), nn.LayerNorm(out_dim), nn.Mish(), nn.Dropout(dropout))


class BaseCorrector(nn.Module, ABC):
    """What every architecture has in common. Implements `types.Corrector`."""

    arch: str
    trunk: nn.Module  # hidden layers, each with LayerNorm and Mish,
    head: nn.Module  # and a plain one after them

    def __init__(self, dims: CorrectorDims) -> None:
        super().__init__()
        self.dims = dims

    @abstractmethod
    def forward(self, visit: Visit) -> tuple[Tensor, Tensor]:
        """→ delta [B, A] and the expected squared error of the corrected action [B], a mean over action dimensions."""

    def added(self, visit: Visit, delta: Tensor) -> Tensor:
        """What fitting penalises [B, A]: how far the executed action is from the one the network starts from."""
        return delta

    def config(self) -> dict[str, Any]:
        """What `build_corrector` needs to make this network again."""
        return {"arch": self.arch, **asdict(self.dims)}


class ResidualCorrector(BaseCorrector):
    """delta = gate ⊙ (π(z) − planned) + residual.

    A subclass turns a `Visit` into features [B, width]. The gated term lets the network fall back to the policy prior, which is all a
    plan's tail consists of; the residual starts at zero, so an untrained corrector leaves the plan nearly as it is.
    """

    def __init__(self, dims: CorrectorDims) -> None:
        super().__init__(dims)
        self.age = nn.Embedding(dims.max_age, 16)
        self.intent = _Normed(2 * dims.action_dim + 16, dims.width, dims.dropout)  # planned action, policy prior, age
        self.trunk = nn.Sequential(*(_Normed(dims.width, dims.width, dims.dropout) for _ in range(2)))
        self.head = nn.Linear(dims.width, 2 * dims.action_dim + 1)
        nn.init.zeros_(self.head.weight)
        with torch.no_grad():
            self.head.bias.zero_()
            self.head.bias[: dims.action_dim] = -2.0  # the gate starts nearly closed

    @abstractmethod
    def features(self, visit: Visit, intent: Tensor) -> Tensor:
        """What was seen, fused with the intent [B, width], as [B, width]."""

    def forward(self, visit: Visit) -> tuple[Tensor, Tensor]:
        age = self.age(visit.age.clamp(max=min(self.dims.oldest_age, self.dims.max_age - 1)))
        intent = self.intent(torch.cat([visit.planned, visit.prior, age], dim=-1))
        out = self.head(self.trunk(self.features(visit, intent)))
        gate, residual, error = out.split([self.dims.action_dim, self.dims.action_dim, 1], dim=-1)
        delta = torch.sigmoid(gate) * (visit.prior - visit.planned) + residual
        return delta, F.softplus(error.squeeze(-1))


class TwoTowerCorrector(ResidualCorrector):
    """Separate encoders of z, z_pred and their difference, each weighed by a gate that sees all of them and the intent."""

    arch = "two-tower"

    def __init__(self, dims: CorrectorDims) -> None:
        super().__init__(dims)
        self.real, self.predicted, self.difference = (_Normed(dims.latent_dim, dims.width, dims.dropout) for _ in range(3))
        self.fusion = nn.Linear(4 * dims.width, 4 * dims.width)

    def features(self, visit: Visit, intent: Tensor) -> Tensor:
        towers = [self.real(visit.z), self.predicted(visit.z_pred), self.difference(visit.z - visit.z_pred), intent]
        seen = torch.cat(towers, dim=-1)
        weighed = torch.sigmoid(self.fusion(seen)) * seen
        return weighed.unflatten(-1, (4, -1)).sum(-2)


class TemporalTransformerCorrector(ResidualCorrector):
    """A small Transformer encoder over the last W steps' mismatch features; the newest step's output is gated with the intent."""

    arch = "temporal"

    def __init__(self, dims: CorrectorDims) -> None:
        super().__init__(dims)
        self.embed = nn.Linear(3 * dims.latent_dim + dims.action_dim, dims.width)
        self.position = nn.Parameter(torch.zeros(dims.history, dims.width))
        self.blocks = nn.ModuleList([_Block(dims.width, dims.heads, dims.dropout) for _ in range(dims.layers)])
        self.norm = nn.LayerNorm(dims.width)
        self.gate = nn.Linear(2 * dims.width, dims.width)

    def features(self, visit: Visit, intent: Tensor) -> Tensor:
        # A latent is a row of softmaxes and never zero, so a slot whose first entry sums to 0 is an empty one.
        filled = visit.history[..., : self.dims.latent_dim].sum(-1) > 0  # [B, W]
        # Every slot may look at itself, so that a row without any history has something to attend to.
        mask = filled[:, None, None, :] | torch.eye(filled.shape[1], dtype=torch.bool, device=filled.device)  # [B, 1, W, W]
        x = self.embed(visit.history) + self.position  # [B, W, width]
        for index, block in enumerate(self.blocks):
            # Only the newest step's output is used, so the last layer computes no other.
            x = block(x, mask, newest_only=index == len(self.blocks) - 1)
        seen = self.norm(x[:, -1])
        gate = torch.sigmoid(self.gate(torch.cat([seen, intent], dim=-1)))
        return gate * seen + (1 - gate) * intent


class _Block(nn.Module):
    """A pre-norm Transformer encoder layer."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = nn.Dropout(dropout)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, mask: Tensor, newest_only: bool) -> Tensor:
        """x [B, W, width], and which slots each may attend to [B, 1, W, W] → [B, W, width], or [B, 1, width] for the newest slot alone."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, heads, W, d]
        if newest_only:
            x, q, mask = x[:, -1:], q[:, :, -1:], mask[:, :, -1:]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.dropout(self.out(attended.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.down(F.mish(self.up(self.norm2(x)))))


class DistilledPolicy(BaseCorrector):
    """The planner's action from the real latent alone; what the plan proposed is replaced, not corrected.

    Three hidden layers of three times the width, which is as many weights as the two-tower has.
    """

    arch = "distilled"

    def __init__(self, dims: CorrectorDims) -> None:
        super().__init__(dims)
        widths = [dims.latent_dim + dims.action_dim, *[3 * dims.width] * 3]
        self.trunk = nn.Sequential(*(_Normed(i, o, dims.dropout) for i, o in zip(widths, widths[1:], strict=False)))
        self.head = nn.Linear(widths[-1], dims.action_dim + 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def propose(self, z: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
        """z [B, Z] and the policy prior's mean there [B, A] → action [B, A], which may exceed [-1, 1], and its expected error [B]."""
        out = self.head(self.trunk(torch.cat([z, prior], dim=-1)))
        return prior + out[..., :-1], F.softplus(out[..., -1])

    def forward(self, visit: Visit) -> tuple[Tensor, Tensor]:
        action, error = self.propose(visit.z, visit.prior)
        return action - visit.planned, error

    def added(self, visit: Visit, delta: Tensor) -> Tensor:
        return visit.planned + delta - visit.prior  # it knows no plan


class _Packed(nn.Module):
    """Layers one after the other, in one call of a CPU's kernels, without gradients. A plain layer may come last."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        parts = [part for layer in layers for part in layer.modules() if isinstance(part, nn.Linear | nn.LayerNorm)]
        weights = [part.weight.detach() for part in parts if isinstance(part, nn.Linear)]
        vectors = [v.detach() for part in parts for v in ([part.bias] if isinstance(part, nn.Linear) else [part.weight, part.bias])]
        self._mlp = PackedMlp(weights, vectors, PLAIN if isinstance(parts[-1], nn.Linear) else MISH)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, in] or [B, N, in] → the same rows, of `out` features."""
        return self._mlp(x)


def packed(network: BaseCorrector) -> BaseCorrector:
    """A copy that computes the same on a CPU in a fraction of the calls; its weights are fixed. Needs `native.multiplies` for fp32."""
    copy = deepcopy(network)
    assert isinstance(copy.trunk, nn.Sequential)
    copy.trunk, copy.head = _Packed(*copy.trunk, copy.head), nn.Identity()
    for part in [part for part in copy.modules() if not isinstance(part, _Normed)]:
        for name, layer in part.named_children():
            if isinstance(layer, _Normed | nn.Linear):
                setattr(part, name, _Packed(layer))
    return copy


CORRECTORS: dict[str, type[BaseCorrector]] = {c.arch: c for c in (TwoTowerCorrector, TemporalTransformerCorrector, DistilledPolicy)}
DEFAULT_ARCHS = (TwoTowerCorrector.arch, TemporalTransformerCorrector.arch)  # fitted where none is named


def build_corrector(arch: str, dims: CorrectorDims) -> BaseCorrector:
    """A new corrector of a known architecture."""
    return CORRECTORS[arch](dims)
