"""A packed model's planner, whose functions are one call each, computes what the formulas make of the same model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from specmpc_cli.engine import native, packed_planner, planner
from specmpc_cli.engine.draws import host_draws
from specmpc_cli.engine.planner import PlannerNoise, PlannerSettings, Rollouts, Search
from specmpc_cli.engine.world_model import WorldModel, WorldModelDims
from tests.conftest import make_model

pytestmark = pytest.mark.compiler
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
SETTINGS = PlannerSettings(discount=0.97, iterations=2, num_samples=150, num_elites=20, num_pi_trajs=11)


class Case(NamedTuple):
    dims: WorldModelDims
    settings: PlannerSettings = SETTINGS
    plans: int = 1


CASES = {
    "one plan": Case(WorldModelDims(5, 6, 32, 48, 24, 2, 2)),
    "odd sizes": Case(WorldModelDims(5, 3, 24, 37, 24, 2, 3, num_bins=21, vmin=-3.0, vmax=5.0)),
    "episodes that end": Case(WorldModelDims(5, 6, 32, 48, 24, 2, 5, episodic=True)),
    "two plans": Case(WorldModelDims(5, 6, 32, 48, 24, 2, 5), plans=2),
    "groups of four": Case(WorldModelDims(5, 1, 20, 48, 24, 2, 2, simnorm_dim=4)),
    "one step": Case(WorldModelDims(5, 6, 32, 48, 24, 2, 2), replace(SETTINGS, horizon=1)),
    "no prior": Case(WorldModelDims(5, 6, 32, 48, 24, 2, 2), replace(SETTINGS, num_pi_trajs=0)),
    "the prior alone": Case(WorldModelDims(5, 6, 32, 48, 24, 2, 2), replace(SETTINGS, num_pi_trajs=150)),
    "two candidates": Case(WorldModelDims(5, 6, 32, 48, 24, 2, 2), replace(SETTINGS, num_samples=2, num_elites=1, num_pi_trajs=1)),
    "a narrow prior": Case(WorldModelDims(5, 6, 32, 48, 24, 2, 2, log_std_min=-5.0, log_std_max=-1.0)),
    "more rows than a block": Case(WorldModelDims(5, 6, 32, 48, 24, 2, 2), replace(SETTINGS, num_samples=600)),
}


class Planned(NamedTuple):
    """A packed model, and what an iteration of a plan is given."""

    model: WorldModel
    z: Tensor
    mean: Tensor
    std: Tensor
    noise: PlannerNoise
    settings: PlannerSettings

    def prior(self, module: Any = packed_planner) -> Rollouts:
        return module.prior_rollouts(self.model, self.z, self.noise.prior_eps, self.settings.discount)

    def iterate(self, module: Any = packed_planner, prior: Rollouts | None = None, **change: Any) -> Search:
        given = {
            "z": self.z,
            "mean": self.mean,
            "std": self.std,
            "prior": prior or self.prior(planner),
            "sample_eps": self.noise.sample_eps[:, 1],
            "terminal_eps": self.noise.terminal_eps[:, 1],
            "q_index": self.noise.q_index[:, 1],
            "settings": self.settings,
        }
        return module.iterate(self.model, **(given | change))

    def alone(self, plan: int) -> Planned:
        noise = PlannerNoise(**{name: getattr(self.noise, name)[plan : plan + 1] for name in PlannerNoise.__dataclass_fields__})
        return self._replace(z=self.z[plan : plan + 1], mean=self.mean[plan : plan + 1], std=self.std[plan : plan + 1], noise=noise)


def planned(name: str, dtype: torch.dtype = torch.float32) -> Planned:
    assert native.built()
    case = CASES[name]
    d, s = case.dims, case.settings
    torch.manual_seed(0)
    model = WorldModel(d).requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    z = model.encode(torch.randn(case.plans, d.obs_dim))
    noise = host_draws(s, d.action_dim, d.num_q, torch.arange(case.plans), torch.arange(case.plans))
    if model.termination_net is not None:  # some candidates' episodes end, and some do not
        last = planner.rollouts(model, z, torch.rand(case.plans, 50, 1, d.action_dim) * 2 - 1, s.discount).last
        model.termination_net[-1].bias.sub_(model.termination_net(last).median())
    packed = model.compute_copy(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "multiplies", lambda _: True)
        packed.pack(int8=dtype is torch.int8)
    mean = torch.rand(case.plans, s.horizon, d.action_dim) - 0.5
    return Planned(packed, z, mean, torch.rand_like(mean) + 0.1, noise, s)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# A feature between two steps of a narrow dtype may be rounded the other way where the last digit of what it is made of differs.
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.int8: 5e-2}


@DTYPES
@pytest.mark.parametrize("name", CASES)
def test_the_priors_rollouts_are_the_formulas(name: str, dtype: torch.dtype) -> None:
    given = planned(name, dtype)
    for what, ours, theirs in zip(Rollouts._fields, given.prior(), given.prior(planner), strict=True):
        assert ours.dtype is torch.float32
        torch.testing.assert_close(ours, theirs, rtol=CLOSE[dtype], atol=CLOSE[dtype], msg=lambda text, what=what: f"{what}: {text}")


@DTYPES
@pytest.mark.parametrize("name", CASES)
def test_an_iteration_is_the_formulas(name: str, dtype: torch.dtype) -> None:
    given = planned(name, dtype)
    ours, theirs = given.iterate(), given.iterate(planner)
    torch.testing.assert_close(ours.values, theirs.values, rtol=CLOSE[dtype], atol=CLOSE[dtype])
    # What is made of the values is compared exactly, from our own ones.
    s, candidates = given.settings, given.prior(planner).actions
    drawn = (given.mean.unsqueeze(1) + given.std.unsqueeze(1) * given.noise.sample_eps[:, 1]).clamp(-1, 1)
    candidates = torch.cat([candidates, drawn], dim=1)
    largest, order = torch.topk(ours.values, s.num_elites)
    assert torch.equal(ours.elite_values, largest)
    elites = torch.stack([rows[index] for rows, index in zip(candidates, order, strict=True)])
    torch.testing.assert_close(ours.elites, elites, rtol=0, atol=1e-6)
    scores = torch.softmax(s.temperature * ours.elite_values.double(), dim=1)
    torch.testing.assert_close(ours.scores.double(), scores, rtol=1e-5, atol=1e-7)
    mean = torch.einsum("bk,bkha->bha", scores, elites.double())
    spread = torch.einsum("bk,bkha->bha", scores, (elites - mean.unsqueeze(1)) ** 2).sqrt()
    torch.testing.assert_close(ours.mean.double(), mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.std.double(), spread.clamp(s.min_std, s.max_std), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_narrow_values_are_the_formulas_but_for_few(dtype: torch.dtype) -> None:
    """The median tells that it is rounding, where the bound above would let more through."""
    given = planned("one plan", dtype)
    assert (given.iterate().values - given.iterate(planner).values).abs().median() < 1e-4


@DTYPES
@pytest.mark.parametrize("name", ["two plans", "episodes that end", "more rows than a block", "two candidates", "no prior"])
def test_plans_are_the_same_to_the_bit_on_any_number_of_threads_and_beside_any_others(name: str, dtype: torch.dtype) -> None:
    given = planned(name, dtype)
    prior, found = given.prior(), given.iterate()
    for count in (1, 3, 8):
        with threads(count):
            assert same(given.prior(), prior) and same(given.iterate(), found)
    for plan in range(len(given.z)):
        alone = given.alone(plan)
        assert same(alone.prior(), tuple(part[plan : plan + 1] for part in prior))
        assert same(alone.iterate(), tuple(part[plan : plan + 1] for part in found))


def test_some_episodes_end_in_that_case() -> None:
    given = planned("episodes that end")
    weight = planner.rollouts(given.model, given.z, given.noise.sample_eps[:, 1].clamp(-1, 1), 0.97).weight
    assert 0.1 < (weight == 0).float().mean() < 0.9


def test_tensors_need_not_lie_side_by_side() -> None:
    given = planned("two plans")
    apart = given.noise.sample_eps[:, 1].transpose(1, 2).contiguous().transpose(1, 2)
    assert not apart.is_contiguous() and same(given.iterate(sample_eps=apart, mean=given.mean.mT.contiguous().mT), given.iterate())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_values_that_are_no_numbers_count_as_zero_and_infinite_ones_as_the_greatest(value: float) -> None:
    given = planned("one plan")
    prior = given.prior()
    spoilt = prior._replace(returns=prior.returns.masked_fill(torch.arange(11) == 3, value))
    found, formulas = given.iterate(prior=spoilt), given.iterate(planner, spoilt)
    assert found.values[0, 3] == formulas.values[0, 3] == torch.tensor(value).nan_to_num(0)
    torch.testing.assert_close(found.values, formulas.values)
    torch.testing.assert_close(found.mean, formulas.mean)


@DTYPES
def test_weights_that_are_no_numbers_make_no_values(dtype: torch.dtype) -> None:
    """As after a training that diverged: a plan is made, and the values say nothing."""
    given = planned("one plan", dtype)
    spoilt = given.model.q.layers.packed
    assert spoilt is not None
    spoilt.vectors.fill_(float("nan"))
    assert not given.iterate().values.any() and given.iterate().mean.isfinite().all()


def test_among_equal_values_the_elites_are_those_of_torch() -> None:
    """Equal values are no rarity where episodes end, and the official code leaves it to torch which of them are elites."""
    given = planned("episodes that end")
    packed = given.model.q.layers.packed
    assert packed is not None
    packed.vectors.fill_(float("nan"))  # no values: all are 0
    ours, theirs = given.iterate(), given.iterate(planner)
    assert not ours.values.any() and not theirs.values.any()
    torch.testing.assert_close(ours.elites, theirs.elites, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"z": torch.rand(1, 31)}, r"z must be fp32 \[1, 32\], got Float \[1, 31\]"),
        ({"z": torch.rand(32)}, r"latents \[B, Z\]"),
        ({"mean": torch.zeros(1, 3, 6, dtype=torch.float64)}, r"mean must be fp32 \[1, 3, 6\], got Double"),
        ({"std": torch.zeros(1, 2, 6)}, "std must be"),
        ({"sample_eps": torch.zeros(1, 139, 3, 5)}, "mean must be|sample_eps must be"),
        ({"terminal_eps": torch.zeros(1, 149, 6)}, r"terminal_eps must be fp32 \[1, 150, 6\]"),
        ({"q_index": torch.tensor([[0, 2]])}, "head 2 of 2"),
        ({"q_index": torch.tensor([0, 1])}, "two heads"),
        ({"settings": replace(SETTINGS, num_elites=151)}, "151 elites of 150 candidates"),
        ({"settings": replace(SETTINGS, num_elites=0)}, "0 elites"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(RuntimeError, match=complaint):
        planned("one plan").iterate(**change)


def test_networks_of_other_sizes_are_refused() -> None:
    given, other = planned("one plan"), planned("odd sizes")
    for net in ("dynamics", "reward_net", "pi_net", "q.layers"):
        spoilt = planned("one plan")
        spoilt.model.get_submodule(net).packed = other.model.get_submodule(net).packed
        with pytest.raises(RuntimeError, match="packed for other sizes"):
            spoilt.prior()
    spoilt = planned("one plan")
    assert spoilt.model.pi_net.packed is not None
    spoilt.model.pi_net.packed.vectors = spoilt.model.pi_net.packed.vectors[:-1]
    with pytest.raises(RuntimeError, match="packed for other sizes"):
        spoilt.prior()
    mixed = planned("one plan", torch.bfloat16)
    mixed.model.reward_net.packed = given.model.reward_net.packed
    with pytest.raises(RuntimeError, match="not packed, or for others"):
        mixed.prior()
    given.model.pi_net.packed = None
    with pytest.raises(AssertionError, match="only in part"):
        given.prior()


def test_what_predicts_is_the_models_and_takes_over_its_weights() -> None:
    model = make_model()
    packed, z, a, obs = packed_planner.PackedBehaviour(model), torch.rand(2, 16), torch.rand(2, 2), torch.randn(2, 4)

    def results(behaviour: planner.Behaviour) -> tuple[Tensor, ...]:
        return behaviour.next(z, a), behaviour.pi_mean(z), behaviour.encode(obs)

    before = results(packed)
    torch.testing.assert_close(before, results(model), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    packed.renew()
    torch.testing.assert_close(results(packed), results(model), rtol=1e-5, atol=1e-6)
    assert not any(torch.allclose(*pair) for pair in zip(results(packed), before, strict=True))
