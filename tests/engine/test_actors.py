"""Actors that never plan: scripts with noise, and the distilled policy."""

from __future__ import annotations

import numpy as np
import torch

from specmpc_cli.engine.actors import DistilledActor, ScriptedActor
from specmpc_cli.engine.correctors import CorrectorDims, DistilledPolicy
from specmpc_cli.types import Decision
from tests.conftest import make_model

CPU = torch.device("cpu")


def act(actor: ScriptedActor, streams: list[int], steps: int) -> torch.Tensor:
    """Actions [steps, B, A] of rows with these streams."""
    state = actor.begin(actor.initial_state(len(streams)), torch.arange(len(streams)), torch.tensor(streams))
    actions = []
    for _ in range(steps):
        action, state, log = actor.act(torch.zeros(len(streams), 3), state, torch.zeros(len(streams), dtype=torch.bool))
        assert (log.decision == -1).all()
        actions.append(action)
    return torch.stack(actions)


def test_a_script_is_followed_exactly_without_noise_and_within_bounds_with_it() -> None:
    target = np.array([0.2, -0.9], np.float32)
    assert torch.equal(act(ScriptedActor(lambda obs: target, 0.0, CPU), [7], 3), torch.from_numpy(target).expand(3, 1, 2))
    noisy = act(ScriptedActor(lambda obs: target, 0.3, CPU), [7], 400)
    assert float(noisy.abs().max()) <= 1.0
    assert abs(float(noisy[..., 0].mean()) - 0.2) < 0.05 and abs(float(noisy[..., 0].std()) - 0.3) < 0.05


def test_a_scripts_noise_depends_on_the_row_alone() -> None:
    actor = ScriptedActor(lambda obs: np.zeros(2, np.float32), 0.3, CPU)
    together, alone = act(actor, [7, 8], 4), act(actor, [8], 4)
    assert torch.equal(together[:, 1:], alone) and not torch.equal(together[:, :1], alone)


def test_the_distilled_policy_acts_on_what_it_sees_alone() -> None:
    model = make_model()
    torch.manual_seed(0)
    network = DistilledPolicy(CorrectorDims(model.dims.latent_dim, model.dims.action_dim, 32, 4)).eval()
    torch.nn.init.normal_(network.head.weight)
    actor = DistilledActor(model, network)
    obs = torch.randn(3, model.dims.obs_dim)
    state = actor.initial_state(3)
    action, state, log = actor.act(obs, state, torch.ones(3, dtype=torch.bool))
    again, _, _ = actor.act(obs, state, torch.zeros(3, dtype=torch.bool))
    z = model.encode(obs)
    torch.testing.assert_close(action, network.propose(z, model.pi_mean(z))[0].clamp(-1, 1).detach())
    assert torch.equal(action, again) and (log.decision == Decision.CORRECT).all() and not log.planner_iterations.any()
