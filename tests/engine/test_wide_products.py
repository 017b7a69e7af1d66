"""What a GPU computes in fewer, larger and padded products is what a CPU computes one by one. Both run here on the CPU, in fp32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specmpc_cli.engine import planner
from specmpc_cli.engine.layers import Affine
from specmpc_cli.engine.planner import final_values, rewards_at_once, rollouts
from specmpc_cli.engine.world_model import WorldModel, WorldModelDims

ROWS, CANDIDATES, HORIZON = 3, 7, 3


def odd_model(num_q: int, episodic: bool = False) -> WorldModel:
    """A model none of whose sizes is a multiple of eight, but for the latent's, which SimNorm needs."""
    torch.manual_seed(0)
    model = WorldModel(WorldModelDims(5, 3, 16, 21, 19, 2, num_q, episodic=episodic, num_bins=11))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.requires_grad_(False)


def padded(model: WorldModel) -> WorldModel:
    twin = model.compute_copy(torch.float32)
    for module in twin.modules():
        if isinstance(module, Affine):
            module.pad(8)
    return twin


def latents_and_actions() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.rand(ROWS, CANDIDATES, 16), torch.rand(ROWS, CANDIDATES, 3) * 2 - 1


@pytest.mark.parametrize("num_q", [2, 5])
def test_padding_changes_nothing_that_a_model_computes(num_q: int) -> None:
    model = odd_model(num_q, episodic=True)
    twin = padded(model)
    sizes = {size for module in twin.modules() if isinstance(module, Affine) for size in module.weight.shape[-2:]}
    assert all(size % 8 == 0 for size in sizes)
    z, a = latents_and_actions()
    shared = z[:, :1]
    q_index = torch.tensor([[0, 1], [1, 0], [num_q - 1, 0]])
    for compute in (
        lambda m: m.encode(torch.ones(2, 5)),
        lambda m: m.next(z, a),
        lambda m: m.next(shared, a),
        lambda m: m.reward(z, a),
        lambda m: m.reward(shared, a),
        lambda m: m.termination_net(z),
        lambda m: torch.cat(m.pi(z), dim=-1),
        lambda m: m.q_pair(z, a, q_index),
        lambda m: m.q.logits(torch.cat([z, a], dim=-1).flatten(0, 1).unsqueeze(0), None),
        lambda m: m.values_at_once(torch.cat([z, a], dim=-1), q_index),
    ):
        torch.testing.assert_close(compute(twin), compute(model), rtol=0, atol=1e-5)


def test_a_padded_copy_takes_over_new_weights() -> None:
    model = odd_model(2)
    twin = padded(model)
    z, a = latents_and_actions()
    for parameter in model.parameters():
        parameter.mul_(1.3)
    assert not torch.allclose(twin.reward(z, a), model.reward(z, a), atol=1e-3)
    twin.take_weights(model)
    torch.testing.assert_close(twin.reward(z, a), model.reward(z, a), rtol=0, atol=1e-5)
    torch.testing.assert_close(twin.next(z, a), model.next(z, a), rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_q", [2, 5])
def test_two_heads_at_once_are_the_two_heads(num_q: int) -> None:
    model = odd_model(num_q)
    z, a = latents_and_actions()
    q_index = torch.tensor([[0, 1], [1, 0], [num_q - 1, 0]])
    torch.testing.assert_close(model.values_at_once(torch.cat([z, a], dim=-1), q_index).mean(1), model.q_pair(z, a, q_index))


def test_rewards_at_once_are_those_of_each_step() -> None:
    model = odd_model(2)
    torch.manual_seed(2)
    actions = torch.rand(ROWS, CANDIDATES, HORIZON, 3) * 2 - 1
    latents = [torch.rand(ROWS, 1, 16), *(torch.rand(ROWS, CANDIDATES, 16) for _ in range(HORIZON - 1))]
    at_once = rewards_at_once(model, latents, actions)
    assert len(at_once) == HORIZON
    for t, reward in enumerate(at_once):
        torch.testing.assert_close(reward, model.reward(latents[t].expand(-1, CANDIDATES, -1), actions[:, :, t]))


def valuing(episodic: bool, num_q: int) -> tuple[WorldModel, tuple[Tensor, ...]]:
    """A model and what `values_of` takes."""
    model = odd_model(num_q, episodic)
    torch.manual_seed(2)
    actions = torch.rand(ROWS, CANDIDATES, HORIZON, 3) * 2 - 1
    q_index = torch.tensor([[0, 1], [1, 0], [num_q - 1, 0]])
    return model, (torch.rand(ROWS, 16), actions, torch.randn(ROWS, CANDIDATES, 3), q_index)


def values_of(model: WorldModel, z: Tensor, actions: Tensor, terminal_eps: Tensor, q_index: Tensor) -> Tensor:
    return final_values(model, rollouts(model, z, actions, 0.9), terminal_eps, q_index)


CASES = pytest.mark.parametrize(("episodic", "num_q"), [(False, 2), (True, 5)])


@CASES
def test_values_are_the_same_either_way(episodic: bool, num_q: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = valuing(episodic, num_q)
    expected = values_of(model, *given)
    monkeypatch.setattr(planner, "_rewards", rewards_at_once)
    monkeypatch.setattr(WorldModel, "q_pair", lambda self, z, a, q_index: self.values_at_once(torch.cat([z, a], dim=-1), q_index).mean(1))
    torch.testing.assert_close(values_of(padded(model), *given), expected, rtol=0, atol=1e-5)


@pytest.mark.gpu
@CASES
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.3)])
def test_values_on_a_gpu_are_those_of_a_cpu(episodic: bool, num_q: int, dtype: torch.dtype, tolerance: float) -> None:
    model, given = valuing(episodic, num_q)
    expected = values_of(model, *given)
    twin = odd_model(num_q, episodic).cuda().compute_copy(dtype)
    twin.take_weights(model.cuda())
    found = values_of(twin, *(value.cuda() for value in given)).cpu()
    torch.testing.assert_close(found, expected, rtol=tolerance / 10, atol=tolerance)
