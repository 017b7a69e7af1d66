"""Rows computed alone on a CPU."""

from __future__ import annotations

import torch

from specmpc_cli.engine.actors import DistilledActor, PolicyActor
from specmpc_cli.engine.correctors import CorrectorDims, DistilledPolicy, build_corrector
from specmpc_cli.engine.rows import row_by_row
from tests.conftest import make_model


def test_a_function_sees_one_row_at_a_time_and_its_results_are_put_together() -> None:
    seen = []

    def both(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(len(x))
        return x + y, x - y

    x, y = torch.arange(6.0).view(3, 2), torch.ones(3, 2)
    total, difference = row_by_row(both, x, y)
    assert torch.equal(total, x + 1) and torch.equal(difference, x - 1) and seen == [1, 1, 1]
    assert row_by_row(both, x[:0], y[:0])[0].shape == (0, 2)  # nobody replans


def test_what_an_actor_does_for_a_row_does_not_depend_on_the_others() -> None:
    model = make_model()
    network = build_corrector("distilled", CorrectorDims(16, 2, 32, 4)).requires_grad_(False).eval()
    assert isinstance(network, DistilledPolicy)
    obs, streams = torch.randn(9, 4), torch.arange(9)
    for actor in (PolicyActor(model), PolicyActor(model, explore=True), DistilledActor(model, network)):
        together = actor.begin(actor.initial_state(9), torch.arange(9), streams)
        actions, *_ = actor.act(obs, together, torch.ones(9, dtype=torch.bool))
        for row in range(9):
            alone = actor.begin(actor.initial_state(1), torch.tensor([0]), streams[row : row + 1])
            action, *_ = actor.act(obs[row : row + 1], alone, torch.ones(1, dtype=torch.bool))
            assert torch.equal(action[0], actions[row])
