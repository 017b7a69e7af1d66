"""The plain path of `bench` computes what the fast one computes: two implementations of one algorithm, from the same draws."""

from __future__ import annotations

import pytest
import torch

from specmpc_cli.engine.batched_planner import BatchedPlanner
from specmpc_cli.engine.planner import PlannerSettings, plan
from specmpc_cli.learning.learner import Learner, LearnerSettings
from specmpc_cli.learning.losses import Batch, LossSettings
from specmpc_cli.learning.plain import PlainLearner, PlainModel, plain_plan
from specmpc_cli.runtime import choose_runtime
from tests.conftest import make_model

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("episodic", [False, True])
@pytest.mark.parametrize("num_q", [2, 5])
@pytest.mark.parametrize("warm", [False, True])
def test_plans_agree(num_q: int, episodic: bool, warm: bool) -> None:
    model = make_model(num_q=num_q, episodic=episodic)
    settings = PlannerSettings(discount=0.97, num_samples=64, num_elites=8, num_pi_trajs=6)
    draws = BatchedPlanner(model, settings).draw(torch.tensor([5]), torch.tensor([3]))
    obs, previous = torch.randn(1, 4), torch.rand(3, 2) - 0.5 if warm else None
    warm_start = torch.zeros(1, 3, 2)
    if previous is not None:
        warm_start[0, :-1] = previous[1:]
    ours = plan(model, model.encode(obs), warm_start, draws, settings)
    action, mean = plain_plan(PlainModel(model), obs, previous, draws, settings)
    torch.testing.assert_close(ours.actions[0, 0], action, **CLOSE)
    torch.testing.assert_close(ours.mean[0], mean, **CLOSE)


@pytest.mark.parametrize("episodic", [False, True])
@pytest.mark.parametrize("num_q", [2, 5])
def test_updates_agree(num_q: int, episodic: bool) -> None:
    model = make_model(num_q=num_q, episodic=episodic)
    losses, settings = LossSettings(0.97), LearnerSettings(dropout=0.0)
    plain = PlainLearner(PlainModel(model), losses, settings)
    learner = Learner(model, losses, settings, choose_runtime("cpu", "fp32"), seed=0)
    for number in range(3):
        torch.manual_seed(number)
        ended = (torch.rand(3, 8) < 0.2).float() if episodic else torch.zeros(3, 8)
        batch = Batch(torch.randn(4, 8, 4), torch.rand(3, 8, 2) * 2 - 1, 3 * torch.randn(3, 8), ended)
        noise = learner.draw(3, 8)
        ours = learner.step(batch, noise)
        total, pi_loss = plain.step(batch, noise)
        assert total == pytest.approx(float(ours.total_loss), rel=1e-4)
        assert pi_loss == pytest.approx(float(ours.pi_loss), rel=1e-4, abs=1e-6)
    torch.testing.assert_close(plain.scale, learner.scale, **CLOSE)
    z, action = torch.rand(5, 16), torch.rand(5, 2)
    torch.testing.assert_close(plain.model.next(z, action), model.next(z, action), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        plain.model.decode(plain.model.reward_logits(z, action)).squeeze(-1), model.reward(z, action), rtol=1e-3, atol=1e-3
    )


def test_only_the_learning_heads_drop_features() -> None:
    """The official code keeps the target heads in evaluation mode."""
    plain = PlainModel(make_model(num_q=3), dropout=0.5).train()
    x = torch.rand(7, 18)
    assert torch.equal(plain.q_target(x), plain.q_target(x)) and not torch.equal(plain.q(x), plain.q(x))
