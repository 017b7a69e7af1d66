"""Distilling the planner: fits a corrector to what fresh plans would have done.

Loss: mean squared error of the corrected action to the fresh plan's weighted elite mean, plus a penalty on what the network adds. A second
head learns the corrected action's own squared error. Episodes, not steps, are held out for validation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from specmpc_cli.engine.correctors import BaseCorrector
from specmpc_cli.engine.runner import Planner
from specmpc_cli.engine.world_model import WorldModel
from specmpc_cli.errors import DatasetError
from specmpc_cli.types import Plan, Visit


@dataclass(frozen=True, slots=True)
class FitSettings:
    """See config.schema.CorrectorConfig."""

    epochs: int
    patience: int
    batch_size: int
    lr: float
    weight_decay: float
    delta_penalty: float


@dataclass(frozen=True, slots=True)
class Epoch:
    """One line of the learning curve. Errors are mean squares per action dimension."""

    epoch: int
    train_error: float
    validation_error: float


@dataclass(frozen=True, slots=True)
class FitReport:
    """A fit and what to hold it against, on the held-out episodes."""

    curve: list[Epoch]
    best: Epoch
    planned_error: float  # of the uncorrected plan
    prior_error: float  # of the policy prior's mean
    train_rows: int
    validation_rows: int


class TupleTable:
    """Rows of a dataset as tensors, with the histories that the runner would have seen rebuilt from episode order."""

    def __init__(self, columns: dict[str, np.ndarray], group: np.ndarray, model: WorldModel, history: int) -> None:
        """
        Args:
            columns: z, z_pred, a_plan, a_teacher_mean, age [rows, ...], each episode's rows together and in step order.
            group: [rows] int, the episode each row belongs to.
            model: the teacher; the policy prior's mean at z is recomputed with it.
        """
        device = next(model.parameters()).device
        self.z, self.z_pred, self.planned, self.label, age = (
            torch.from_numpy(columns[name]).to(device) for name in ("z", "z_pred", "a_plan", "a_teacher_mean", "age")
        )
        self.age = age.long()
        with torch.no_grad():
            self.prior = torch.cat([model.pi_mean(part) for part in self.z.split(4096)])
        features = torch.cat([self.z, self.z_pred, self.z - self.z_pred, self.planned], dim=1)
        self._features = torch.cat([features, torch.zeros_like(features[:1])])  # the last row is the empty slot
        self._window = torch.from_numpy(_windows(group, history)).to(device)

    def __len__(self) -> int:
        return len(self.z)

    def visit(self, rows: Tensor) -> Visit:
        """These rows as the corrector would have met them."""
        return Visit(
            self.z[rows],
            self.z_pred[rows],
            self.planned[rows],
            self.prior[rows],
            self.age[rows],
            self._features[self._window[rows]],
        )


def _windows(group: np.ndarray, history: int) -> np.ndarray:
    """[rows, history] indices of each row's last steps within its episode, its own last; −1 (the empty slot) before the first."""
    index = np.arange(len(group))[:, None] + np.arange(1 - history, 1)[None]
    same_episode = (index >= 0) & (group[np.clip(index, 0, None)] == group[:, None])
    return np.where(same_episode, index, -1)


def split_by_episode(group: np.ndarray, validation_share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row indices for training and validation; whole episodes are held out. Raises DatasetError with fewer than two episodes."""
    episodes = np.unique(group)
    if len(episodes) < 2:
        raise DatasetError("fitting needs at least 2 episodes, one of them held out; collect more with --episodes")
    held_out = min(max(1, round(len(episodes) * validation_share)), len(episodes) - 1)
    chosen = np.random.default_rng(seed).permutation(episodes)[:held_out]
    validation = np.isin(group, chosen)
    return np.flatnonzero(~validation), np.flatnonzero(validation)


def fit_corrector(
    corrector: BaseCorrector,
    table: TupleTable,
    train: np.ndarray,
    validation: np.ndarray,
    settings: FitSettings,
    *,
    seed: int,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> FitReport:
    """Fits in place and leaves the weights of the best validation error, stopping after `patience` epochs without a better one.

    Raises:
        DatasetError: the loss is not finite, which only damaged data can cause.
    """
    device = table.z.device
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(corrector.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
    batches = -(-len(train) // settings.batch_size)
    steps = settings.epochs * batches
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _warm_up_then_cosine(step, steps))
    rows, held_out = torch.from_numpy(train), torch.from_numpy(validation).to(device)
    curve: list[Epoch] = []
    best, best_weights = None, {}
    for epoch in range(1, settings.epochs + 1):
        corrector.train()
        total = 0.0
        for batch in _shuffled(rows, settings.batch_size, generator):
            error, loss = _loss(corrector, table, batch.to(device), settings.delta_penalty)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            total += float(error) * len(batch)
        line = Epoch(epoch, total / len(train), _error(corrector, table, held_out))
        if not np.isfinite([line.train_error, line.validation_error]).all():
            raise DatasetError(f"the loss is not finite in epoch {epoch}; the dataset is damaged, collect it again")
        curve.append(line)
        if on_epoch is not None:
            on_epoch(line)
        if best is None or line.validation_error < best.validation_error:
            best, best_weights = line, {name: value.clone() for name, value in corrector.state_dict().items()}
        elif epoch - best.epoch >= settings.patience:
            break
    assert best is not None
    corrector.load_state_dict(best_weights)
    corrector.requires_grad_(False).eval()
    label = table.label[held_out]
    return FitReport(
        curve=curve,
        best=best,
        planned_error=float((table.planned[held_out] - label).square().mean()),
        prior_error=float((table.prior[held_out] - label).square().mean()),
        train_rows=len(train),
        validation_rows=len(validation),
    )


def _warm_up_then_cosine(step: int, steps: int) -> float:
    """Share of the peak learning rate: up over the first tenth, down to zero along half a cosine."""
    warm_up = max(steps // 10, 1)
    return min((step + 1) / warm_up, 1.0) * 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))


def _loss(corrector: BaseCorrector, table: TupleTable, rows: Tensor, delta_penalty: float) -> tuple[Tensor, Tensor]:
    visit = table.visit(rows)
    delta, expected = corrector(visit)
    error = (visit.planned + delta - table.label[rows]).square().mean(-1)  # [rows]
    calibration = (expected - error.detach()).square().mean()
    return error.detach().mean(), error.mean() + delta_penalty * corrector.added(visit, delta).square().mean() + calibration


@torch.no_grad()
def _error(corrector: BaseCorrector, table: TupleTable, rows: Tensor) -> float:
    """Mean squared error of the action that would be executed."""
    corrector.eval()
    total = 0.0
    for part in rows.split(4096):
        visit = table.visit(part)
        executed = (visit.planned + corrector(visit)[0]).clamp(-1, 1)
        total += float((executed - table.label[part]).square().mean(-1).sum())
    return total / len(rows)


def _shuffled(rows: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    yield from rows[torch.randperm(len(rows), generator=generator)].split(batch_size)


@torch.inference_mode()
def label_noise(planner: Planner, z: Tensor, warm_start: Tensor, label: Tensor, *, seed: int) -> float:
    """How much a label differs from another of the same state: mean squared difference to independently redrawn plans.

    A corrector that knew the mean of all possible labels would still be left with half of it.

    Args:
        z, warm_start, label: of the states to plan again, [n, Z], [n, H, A], [n, A].
    """
    return float((plan_anew(planner, z, warm_start, seed=seed).mean[:, 0] - label).square().mean())


def plan_anew(planner: Planner, z: Tensor, warm_start: Tensor, *, seed: int) -> Plan:
    """Plans of recorded states, with draws that no episode makes. z [n, Z], warm_start [n, H, A]."""
    streams = torch.full((len(z),), 2**62 + seed, dtype=torch.int64, device=z.device)  # no episode's stream: those are hashes
    return planner(z, warm_start, streams, torch.arange(len(z), device=z.device))
