"""The planner on a world whose best plan is known: linear latents, quadratic reward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from specmpc_cli.engine.batched_planner import BatchedPlanner
from specmpc_cli.engine.compiled import compiled
from specmpc_cli.engine.planner import PlannerNoise, PlannerSettings, Search, largest_by_rank, plan
from tests.conftest import make_model

SETTINGS = PlannerSettings(discount=1.0, horizon=4, iterations=20, num_samples=1024, num_elites=64, num_pi_trajs=8, temperature=50.0)


class LinearQuadratic:
    """z' = z + 0.5 a; reward −‖z'‖² − 0.1‖a‖²; value 0 after the horizon; the policy prior is pure noise."""

    termination_net = None

    def next(self, z: Tensor, a: Tensor) -> Tensor:
        return z + 0.5 * a

    def reward(self, z: Tensor, a: Tensor) -> Tensor:
        return -self.next(z, a).square().sum(-1) - 0.1 * a.square().sum(-1)

    def pi_sample(self, z: Tensor, eps: Tensor) -> Tensor:
        return torch.tanh(eps)

    def q_pair(self, z: Tensor, a: Tensor, q_index: Tensor) -> Tensor:
        return torch.zeros(z.shape[:-1])

    def best_first_action(self, z: Tensor) -> Tensor:
        """By Riccati recursion over the horizon (unconstrained): a = −k z with gain of the first step."""
        cost_to_go = 0.0
        for _ in range(SETTINGS.horizon):
            weight = 1.0 + cost_to_go  # cost of z'
            gain = 0.5 * weight / (0.1 + 0.25 * weight)
            cost_to_go = weight * (1 - 0.5 * gain) ** 2 + 0.1 * gain**2
        return -gain * z


def noise(rows: int, seed: int = 0, s: PlannerSettings = SETTINGS, a: int = 2) -> PlannerNoise:
    g = torch.Generator().manual_seed(seed)
    return PlannerNoise(
        prior_eps=torch.randn(rows, s.num_pi_trajs, s.horizon, a, generator=g),
        sample_eps=torch.randn(rows, s.iterations, s.num_samples - s.num_pi_trajs, s.horizon, a, generator=g),
        terminal_eps=torch.randn(rows, s.iterations, s.num_samples, a, generator=g),
        q_index=torch.zeros(rows, s.iterations, 2, dtype=torch.int64),
        exponential=torch.empty(rows, s.num_elites).exponential_(generator=g),
    )


def test_finds_the_optimal_action_of_a_linear_quadratic_problem() -> None:
    world = LinearQuadratic()
    z = torch.tensor([[0.3, -0.2], [-0.1, 0.25]])
    made = plan(world, z, torch.zeros(2, 4, 2), noise(2), SETTINGS)  # type: ignore[arg-type]
    torch.testing.assert_close(made.mean[:, 0], world.best_first_action(z), rtol=0, atol=0.05)


def test_clips_to_the_action_range() -> None:
    z = torch.full((1, 2), 50.0)
    made = plan(LinearQuadratic(), z, torch.zeros(1, 4, 2), noise(1), SETTINGS)  # type: ignore[arg-type]
    assert made.actions.abs().max() <= 1
    assert (made.mean[:, 0] < -0.8).all()  # far away, full speed back


def test_the_latents_are_those_of_the_executed_actions() -> None:
    world = LinearQuadratic()
    made = plan(world, torch.tensor([[0.3, -0.2]]), torch.zeros(1, 4, 2), noise(1), SETTINGS)  # type: ignore[arg-type]
    z = made.latents[:, 0]
    for t in range(4):
        z = world.next(z, made.actions[:, t])
        assert torch.equal(z, made.latents[:, t + 1])


def test_a_plan_is_a_function_of_its_arguments_and_rows_do_not_mix() -> None:
    world, z = LinearQuadratic(), torch.tensor([[0.3, -0.2], [-0.1, 0.25]])
    n, warm = noise(2), torch.zeros(2, 4, 2)
    both = plan(world, z, warm, n, SETTINGS)  # type: ignore[arg-type]
    again = plan(world, z, warm, n, SETTINGS)  # type: ignore[arg-type]
    assert torch.equal(both.actions, again.actions)
    second = PlannerNoise(n.prior_eps[1:], n.sample_eps[1:], n.terminal_eps[1:], n.q_index[1:], n.exponential[1:])
    alone = plan(world, z[1:], warm[1:], second, SETTINGS)  # type: ignore[arg-type]
    torch.testing.assert_close(both.take(torch.tensor([1])).mean, alone.mean, rtol=0, atol=1e-6)


def test_weights_sum_to_one_and_elites_are_the_best() -> None:
    searches: list[Search] = []
    plan(LinearQuadratic(), torch.ones(1, 2), torch.zeros(1, 4, 2), noise(1), SETTINGS, on_iteration=searches.append)  # type: ignore[arg-type]
    for search in searches:
        assert search.scores.sum().item() == pytest.approx(1, abs=1e-5)
        rest = search.values[0].sort(descending=True).values
        torch.testing.assert_close(search.elite_values[0], rest[: SETTINGS.num_elites])
        assert (search.std >= SETTINGS.min_std).all() and (search.std <= SETTINGS.max_std).all()


def test_exploration_noise_moves_only_the_first_action() -> None:
    quiet = noise(1)
    loud = replace(quiet, action_eps=torch.full((1, 2), 0.5))
    z, warm = torch.tensor([[0.3, -0.2]]), torch.zeros(1, 4, 2)
    a = plan(LinearQuadratic(), z, warm, quiet, SETTINGS)  # type: ignore[arg-type]
    b = plan(LinearQuadratic(), z, warm, loud, SETTINGS)  # type: ignore[arg-type]
    torch.testing.assert_close(b.actions[:, 0], (a.actions[:, 0] + 0.5 * a.std[:, 0]).clamp(-1, 1))
    assert torch.equal(a.actions[:, 1:], b.actions[:, 1:])


def test_the_first_iteration_may_spread_less_than_the_clamp() -> None:
    seen: list[Tensor] = []
    model, z, warm = LinearQuadratic(), torch.tensor([[0.3, -0.2]]), torch.full((1, 4, 2), 0.2)
    narrow = replace(SETTINGS, iterations=1, first_std=1e-4)
    plan(model, z, warm, noise(1), narrow, on_iteration=lambda search: seen.append(search.elites))  # type: ignore[arg-type]
    assert len(seen) == 1
    prior = noise(1).prior_eps.shape[1]
    # What is not the policy prior's lies where the warm start is.
    near = (seen[0] - 0.2).abs().amax(dim=(2, 3)) < 1e-2
    assert int((~near).sum()) <= prior and near.any()


def test_values_that_are_not_numbers_count_as_zero() -> None:
    class Broken(LinearQuadratic):
        def reward(self, z: Tensor, a: Tensor) -> Tensor:
            return super().reward(z, a).masked_fill(a[..., 0] > 0, torch.nan)

    made = plan(Broken(), torch.tensor([[0.3, -0.2]]), torch.zeros(1, 4, 2), noise(1), SETTINGS)  # type: ignore[arg-type]
    assert torch.isfinite(made.mean).all()


SMALL = PlannerSettings(discount=0.99, iterations=2, num_samples=32, num_elites=8, num_pi_trajs=4)


def keys(rows: int) -> tuple[Tensor, Tensor]:
    return torch.arange(100, 100 + rows), torch.arange(rows)


@pytest.mark.parametrize("num_q", [2, 5])
def test_batched_planning_gives_each_row_the_plan_it_gets_alone(num_q: int) -> None:
    model = make_model(num_q=num_q)
    z, warm = model.encode(torch.randn(7, 4, generator=torch.Generator().manual_seed(0))), torch.zeros(7, 3, 2)
    streams, steps = keys(7)
    one_by_one = BatchedPlanner(model, SMALL, batch_sizes=(1,))(z, warm, streams, steps)
    batched = BatchedPlanner(model, SMALL, batch_sizes=(1, 4))(z, warm, streams, steps)
    torch.testing.assert_close(one_by_one.mean, batched.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(one_by_one.latents, batched.latents, rtol=0, atol=1e-5)
    alone = BatchedPlanner(model, SMALL)(z[3:4], warm[3:4], streams[3:4], steps[3:4])
    assert torch.equal(alone.actions[0], one_by_one.actions[3])


def test_batches_are_filled_up_where_little_is_wasted() -> None:
    planner = BatchedPlanner(make_model(), SMALL, batch_sizes=(1, 4, 16))
    met = {rows: [] for rows in (1, 2, 3, 5, 8, 10, 20)}

    def counting(size: int, call: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
        return lambda *given: (calls.append(size), call(*given))[1]

    planner._calls = {size: counting(size, call) for size, call in planner._calls.items()}  # type: ignore[misc]
    for rows in met:
        calls = met[rows]
        z, warm = torch.randn(rows, 16), torch.zeros(rows, 3, 2)
        assert planner(z, warm, *keys(rows)).value.shape == (rows,)
    assert met == {1: [1], 2: [4], 3: [4], 5: [4, 1], 8: [16], 10: [16], 20: [16, 4]}
    assert planner.sizes_for(1) == [1] and planner.sizes_for(7) == [1, 4] and planner.sizes_for(8) == [1, 4, 16]


def test_a_refining_planner_shares_the_networks_and_leaves_the_first_as_it_was() -> None:
    model = make_model()
    planner = BatchedPlanner(model, SMALL)
    z, warm = model.encode(torch.randn(2, 4, generator=torch.Generator().manual_seed(0))), torch.zeros(2, 3, 2)
    before = planner(z, warm, *keys(2))
    other = planner.refining(iterations=1, first_std=0.3)
    expected = BatchedPlanner(model, replace(SMALL, iterations=1, first_std=0.3))
    assert torch.equal(other(z, warm, *keys(2)).actions, expected(z, warm, *keys(2)).actions)
    assert torch.equal(planner(z, warm, *keys(2)).actions, before.actions) and planner.settings == SMALL
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    planner.refresh(), expected.refresh()
    assert torch.equal(other(z, warm, *keys(2)).actions, expected(z, warm, *keys(2)).actions)


def test_draws_depend_on_stream_and_step_alone() -> None:
    planner = BatchedPlanner(make_model(num_q=5), SMALL)
    first = planner.draw(torch.tensor([5, 6]), torch.tensor([0, 9]))
    again = planner.draw(torch.tensor([6]), torch.tensor([9]))
    other = planner.draw(torch.tensor([6]), torch.tensor([10]))
    assert torch.equal(first.sample_eps[1], again.sample_eps[0])
    assert not torch.equal(again.sample_eps, other.sample_eps)
    assert (first.q_index[..., 0] != first.q_index[..., 1]).all()  # two different heads


def test_bf16_plans_are_close_to_fp32_plans() -> None:
    model = make_model()
    z, warm = model.encode(torch.randn(4, 4, generator=torch.Generator().manual_seed(1))), torch.zeros(4, 3, 2)
    exact = BatchedPlanner(model, SMALL)(z, warm, *keys(4))
    fast = BatchedPlanner(model, SMALL, dtype=torch.bfloat16)(z, warm, *keys(4))
    assert fast.mean.dtype == torch.float32
    torch.testing.assert_close(exact.mean, fast.mean, rtol=0, atol=0.2)


def values_with_equals() -> torch.Tensor:
    torch.manual_seed(5)
    values = torch.randn(3, 64)
    values[1] = values[1].round()
    values[2] = torch.tensor([0.0, -0.0]).repeat(32)
    values[0, :3] = torch.tensor([torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max, torch.finfo(torch.float32).max])
    return values


@pytest.mark.parametrize("count", [1, 7, 64])
def test_the_largest_by_rank_are_the_first_of_a_stable_sort(count: int) -> None:
    values = values_with_equals()
    largest, index = largest_by_rank(values, count)
    assert torch.equal(largest, torch.topk(values, count, dim=1).values)
    assert torch.equal(index, torch.sort(values, dim=1, descending=True, stable=True).indices[:, :count])


@pytest.mark.gpu
def test_the_largest_by_rank_are_the_same_compiled_on_a_gpu() -> None:
    values = values_with_equals()
    for ours, theirs in zip(compiled(largest_by_rank)(values.cuda(), 7), largest_by_rank(values, 7), strict=True):
        assert torch.equal(ours.cpu(), theirs)
