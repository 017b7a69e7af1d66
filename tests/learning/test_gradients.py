"""Gradients that go by hand from kernel to kernel are autograd's, whatever the model has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from specmpc_cli.engine import native
from specmpc_cli.engine.world_model import WorldModel, WorldModelDims
from specmpc_cli.learning.gradients import AutogradGradients, KernelGradients
from specmpc_cli.learning.learner import draw_dropout
from specmpc_cli.learning.losses import Batch, LossSettings, UpdateNoise
from specmpc_cli.runtime import Runtime

pytestmark = pytest.mark.compiler
CPU = torch.device("cpu")
EAGER = Runtime(CPU, torch.float32, compiled=False, threads=1)
SETTINGS = LossSettings(0.97, entropy_coef=0.01)


class Case(NamedTuple):
    num_q: int = 3
    episodic: bool = False
    tasks: int = 0
    demonstrated: bool = False
    horizon: int = 3
    size: int = 16
    dropout: float = 0.1
    num_enc_layers: int = 2


CASES = {
    "one task": Case(),
    "two heads": Case(num_q=2),
    "one that terminates": Case(episodic=True),
    "demonstrations": Case(demonstrated=True),
    "a task set": Case(tasks=3),
    "a task set that terminates, and demonstrations": Case(tasks=3, episodic=True, demonstrated=True),
    "one step of one slice": Case(horizon=1, size=1, episodic=True),
    "one slice of a task set": Case(size=1, tasks=3),
    "more rows than a chunk": Case(horizon=2, size=133, tasks=3, episodic=True),
    "no dropout": Case(dropout=0.0),
    "a deeper encoder": Case(num_enc_layers=4),
}


def make_model(case: Case) -> WorldModel:
    """All its weights are drawn: no head is zero, no embedding of a norm above 1."""
    torch.manual_seed(0)
    tasks = {"num_tasks": case.tasks, "task_dim": 5} if case.tasks else {}
    model = WorldModel(WorldModelDims(4, 2, 16, 24, 24, case.num_enc_layers, case.num_q, episodic=case.episodic, **tasks))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and name != "task_emb.weight":
                parameter.normal_(std=0.3)
    if case.tasks:
        model.action_masks[1, 1] = 0.0  # the second task has one action dimension
    return model.train()


def make_batch(case: Case) -> Batch:
    horizon, size = case.horizon, case.size
    obs, action, reward = torch.randn(horizon + 1, size, 4), torch.rand(horizon, size, 2) * 2 - 1, 3 * torch.randn(horizon, size)
    ended = (torch.rand(horizon, size) < 0.3).float() if case.episodic else torch.zeros(horizon, size)
    task = torch.arange(size) % case.tasks if case.tasks else None
    return Batch(obs, action, reward, ended, task, (torch.arange(size) % 2).float() if case.demonstrated else None)


def draw(case: Case) -> UpdateNoise:
    horizon, size = case.horizon, case.size
    return UpdateNoise(
        td_eps=torch.randn(horizon, size, 2),
        td_q_index=torch.randperm(case.num_q)[:2],
        pi_eps=torch.randn(horizon + 1, size, 2),
        pi_q_index=torch.randperm(case.num_q)[:2],
        q_dropout=draw_dropout((case.num_q, horizon * size, 24), case.dropout, CPU),
        pi_q_dropout=draw_dropout((2, (horizon + 1) * size, 24), case.dropout, CPU),
    )


def both(kind: type[AutogradGradients] | type[KernelGradients], case: Case, batch: Batch) -> Iterator[dict[str, Tensor | None]]:
    """The values and gradients of each of the two losses, of a model of its own."""
    assert native.built(), native.problem()
    model = make_model(case)
    model.q_target.requires_grad_(False)
    discounts = torch.tensor([0.9, 0.95, 0.97]) if case.tasks else None
    gradients = kind(model, SETTINGS, discounts, EAGER)
    torch.manual_seed(1)
    noise = draw(case)
    loss = gradients.world_model(batch, noise)
    yield loss._asdict() | {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    policy = gradients.policy(loss.latents, noise, torch.tensor(1.3), batch)
    yield policy._asdict() | {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", CASES)
def test_gradients_by_kernels_are_autograds(name: str) -> None:
    case = CASES[name]
    batch = make_batch(case)
    learnt = 0
    for exact, ours in zip(both(AutogradGradients, case, batch), both(KernelGradients, case, batch), strict=True):
        for part, value in exact.items():
            mine = ours[part]
            assert (mine is None) == (value is None), part
            if mine is not None and value is not None:
                learnt += bool(value.any())
                assert mine is not value and not mine.requires_grad
                scale = float(value.abs().max())
                torch.testing.assert_close(mine, value, rtol=1e-4, atol=1e-6 + 1e-5 * scale, msg=lambda text, part=part: f"{part}: {text}")
    assert learnt > 40, "all networks learn"


def test_gradients_are_added_to_those_that_are_there() -> None:
    case = CASES["a task set"]
    model = make_model(case)
    gradients = KernelGradients(model, SETTINGS, torch.tensor([0.9, 0.95, 0.97]), EAGER)
    batch, noise = make_batch(case), draw(case)
    gradients.world_model(batch, noise)
    once = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    gradients.world_model(batch, noise)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name not in once)
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, 2 * once[name])


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize("field", ["obs", "action", "reward"])
def test_what_is_not_finite_is_not_hidden(field: str, broken: float) -> None:
    """But an infinite reward: its coding ends at the last bin."""
    case = CASES["one that terminates"]
    batch = make_batch(case)
    getattr(batch, field)[0, 0] = broken
    model = make_model(case)
    loss = KernelGradients(model, SETTINGS, None, EAGER).world_model(batch, draw(case))
    expected = AutogradGradients(make_model(case), SETTINGS, None, EAGER).world_model(batch, draw(case))
    assert loss.total.isfinite() == expected.total.isfinite()
    assert loss.total.isfinite() == (field == "reward" and broken == torch.inf)


def test_what_does_not_fit_is_refused() -> None:
    z, seen, reward, q, one = torch.rand(3, 4, 8), torch.rand(2, 4, 8), torch.rand(8, 101), torch.rand(2, 8, 101), torch.zeros(2, 4)

    def rollout_loss(**change: Tensor | tuple[float, ...] | None) -> None:
        given = {"z": z, "seen": seen, "reward_logits": reward, "q_logits": q, "ended_logits": None} | {
            "reward": one,
            "target": one,
            "terminated": one,
        }
        numbers = {"rho": 0.5, "coefs": (1.0, 1.0, 1.0, 1.0), "low": -10.0, "high": 10.0}
        torch.ops.specmpc.rollout_loss(**(given | numbers | change))

    assert native.built()
    rollout_loss()
    for message, change in {
        "z is": {"z": z[0]},
        "has four coefficients": {"coefs": (1.0, 2.0)},
        "seen should be 64 values": {"seen": seen[:1]},
        "reward logits should be 808": {"reward_logits": reward[1:]},
        "q logits should be 1616": {"q_logits": q[:, 1:]},
        "terminations should be 8": {"terminated": one[:1]},
        "termination logits should be 8": {"ended_logits": one[:1]},
        "rewards should be 8 values of fp32": {"reward": one.double()},
    }.items():
        with pytest.raises(RuntimeError, match=message):
            rollout_loss(**change)
    with pytest.raises(RuntimeError, match="features should be 12"):
        torch.ops.specmpc.draw_policy(torch.zeros(3, 2), torch.zeros(3, 2), None, -10.0, 2.0)
    with pytest.raises(RuntimeError, match="logits are"):
        torch.ops.specmpc.draw_loss(reward, one, torch.ones(()), 0.5, 0.1, 0.01, -10.0, 10.0)
