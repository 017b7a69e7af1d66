"""Packed networks compute what their layers do, and planners use them."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import fields

import pytest
import torch

from specmpc_cli.engine import native
from specmpc_cli.engine.batched_planner import BatchedPlanner
from specmpc_cli.engine.compiled import compiled_kernels
from specmpc_cli.engine.layers import Affine, Mlp, SimNorm, Stack
from specmpc_cli.engine.planner import PlannerSettings
from specmpc_cli.engine.world_model import QEnsemble, WorldModel
from specmpc_cli.errors import ConfigError
from tests.conftest import make_model


@pytest.mark.compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_stacks_compute_what_their_layers_do(dtype: torch.dtype) -> None:
    assert native.built()
    torch.manual_seed(0)
    nets: list[Stack] = [Mlp(38, [48, 48], 32, SimNorm(8)), Mlp(38, [48], 5), Mlp(38, [], 5)]
    q = QEnsemble(4, 38, 48, 11)
    for layer in (layer for net in (*nets, q.layers) for layer in net):
        assert isinstance(layer, Affine)
        torch.nn.init.normal_(layer.requires_grad_(False).bias)
        layer.weight.data, layer.bias.data = layer.weight.data.to(dtype) * 10, layer.bias.data.to(dtype)
    x, shared, own = torch.randn(1, 50, 38), torch.randn(1, 1, 32), torch.randn(1, 50, 6)
    close = dict(rtol=0, atol=1e-5 if dtype is torch.float32 else 0.05)

    def packed(net: Stack) -> Stack:
        twin = copy.deepcopy(net)
        twin.pack()
        return twin

    for net in nets:
        torch.testing.assert_close(packed(net)(x), net(x), **close)
        torch.testing.assert_close(packed(net)(x[0]), net(x[0]), **close)
    alike = shared.to(dtype).float()
    torch.testing.assert_close(packed(nets[0])(alike, own), nets[0](alike, own), **close)
    together = torch.cat([alike.expand(-1, 50, -1), own], -1)
    torch.testing.assert_close(packed(nets[0])(alike, own), packed(nets[0])(together), **close)
    twin = copy.deepcopy(q)
    twin.layers.pack()
    for head, rows in (
        (1, x),
        (None, x),
        (None, x.expand(4, -1, -1)),
        (torch.tensor([2]), x),
        (torch.tensor([0, 3]), x.expand(2, -1, -1)),
    ):
        plain, fused = q.logits(rows, head), twin.logits(rows, head)
        assert plain.shape == fused.shape and plain.dtype == fused.dtype
        torch.testing.assert_close(fused, plain, **close)


SMALL = PlannerSettings(discount=0.99, iterations=2, num_samples=32, num_elites=8, num_pi_trajs=4)


def calls(planner: BatchedPlanner, model: WorldModel) -> Counter[str]:
    """Of our own kernels, by one plan."""
    keys = torch.tensor([1]), torch.tensor([3])
    with torch.inference_mode():
        arguments = model.encode(torch.randn(1, 4)), torch.zeros(1, 3, 2), *keys
        planner(*arguments)
        with torch.profiler.profile() as profile:
            planner(*arguments)
    return Counter({event.key: event.count for event in profile.key_averages() if event.key.startswith("specmpc::")})


@pytest.mark.compiler
def test_a_compiled_planner_uses_them_and_takes_over_new_weights() -> None:
    model, other = make_model(), make_model()
    planner = BatchedPlanner(model, SMALL, kernels=compiled_kernels())
    # The prior's rollouts, two iterations, and the latents of three steps.
    assert calls(planner, model) == {"specmpc::prior_rollouts": 1, "specmpc::iterate": 2, "specmpc::fused_mlp": 3}
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.copy_(theirs + 0.01)
    planner.refresh()
    arguments = torch.rand(1, 16), torch.zeros(1, 3, 2), torch.tensor([1]), torch.tensor([3])
    with torch.inference_mode():
        expected = BatchedPlanner(model, SMALL)(*arguments)
        torch.testing.assert_close(planner(*arguments).mean, expected.mean, rtol=0, atol=1e-4)


@pytest.mark.compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_a_planner_that_took_over_weights_is_as_one_made_for_them(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, and in all that a plan has: a training that goes on plans as one that was continued, and as `eval`."""
    assert native.built()
    monkeypatch.setattr(native, "multiplies", lambda _: True)
    model = make_model()
    arguments = torch.rand(1, 16), torch.zeros(1, 3, 2), torch.tensor([1]), torch.tensor([3])
    with torch.inference_mode():
        planner = BatchedPlanner(model, SMALL, dtype=dtype, kernels=compiled_kernels())
        before = planner(*arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    planner.refresh()
    with torch.inference_mode():
        after, anew = planner(*arguments), BatchedPlanner(model, SMALL, dtype=dtype, kernels=compiled_kernels())(*arguments)
    for field in fields(after):
        assert torch.equal(getattr(after, field.name), getattr(anew, field.name)), field.name
        assert not torch.equal(getattr(after, field.name), getattr(before, field.name)), field.name


@pytest.mark.compiler
def test_a_model_without_kernels_for_its_dtype_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "multiplies", lambda dtype: dtype is torch.float32)
    half, full = (make_model().compute_copy(dtype) for dtype in (torch.bfloat16, torch.float32))
    for model in (half, full):
        model.pack()
    assert half.dynamics.packed is None and full.dynamics.packed is not None
    assert full.encoder.packed is None, "it does not plan"


@pytest.mark.compiler
def test_nothing_is_copied_from_a_packed_model() -> None:
    """Whose parameters need not be what it computes with."""
    model = make_model().compute_copy(torch.float32)
    model.pack()
    for copy_from in (lambda: model.compute_copy(torch.bfloat16), lambda: make_model().take_weights(model)):
        with pytest.raises(AssertionError, match="may be old"):
            copy_from()


@pytest.mark.compiler
def test_a_model_that_cannot_multiply_int8_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "multiplies", lambda dtype: dtype is torch.float32)
    with pytest.raises(ConfigError, match="--dtype int8 has no products here: .*; use --dtype auto"):
        make_model().compute_copy(torch.int8).pack(int8=True)


@pytest.mark.compiler
def test_a_planner_in_int8_searches_in_8_bits_and_predicts_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.built()
    monkeypatch.setattr(native, "multiplies", lambda _: True)
    model = make_model()
    planner = BatchedPlanner(model, SMALL, dtype=torch.int8, kernels=compiled_kernels())
    assert calls(planner, model) == calls(BatchedPlanner(model, SMALL, kernels=compiled_kernels()), model)
    assert planner.networks.ready()[0].dynamics.packed.weights.dtype is torch.int8
    arguments = torch.rand(1, 16), torch.zeros(1, 3, 2), torch.tensor([1]), torch.tensor([3])
    with torch.inference_mode():
        found, exact = planner(*arguments), BatchedPlanner(model, SMALL)(*arguments)
        assert 0 < (found.mean - exact.mean).abs().max() < 0.2
        latent = arguments[0]
        for t in range(3):
            latent = model.next(latent, found.actions[:, t])
            torch.testing.assert_close(found.latents[:, t + 1], latent)


@pytest.mark.compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_a_packed_model_takes_over_weights_of_every_net(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.built()
    monkeypatch.setattr(native, "multiplies", lambda _: True)
    model, other = make_model(episodic=True), make_model(episodic=True)
    assert model.termination_net is not None
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.copy_(theirs + 0.05 * torch.randn_like(theirs))
    plain, packed = other.compute_copy(dtype), other.compute_copy(dtype)
    packed.pack(int8=dtype is torch.int8)
    z, a, index = torch.rand(1, 20, 16), torch.rand(1, 20, 2) - 0.5, torch.tensor([[0, 1]])
    for twin in (plain, packed):
        twin.take_weights(model)
    close = dict(rtol=0, atol={torch.float32: 1e-5, torch.bfloat16: 0.05, torch.int8: 0.08}[dtype])
    for compute in (
        lambda m: m.next(z, a),
        lambda m: m.next(z[:, :1], a),
        lambda m: m.reward(z, a),
        lambda m: m.reward(z[:, :1], a),
        lambda m: m.pi_sample(z, a),
        lambda m: m.q_pair(z, a, index),
        lambda m: m.termination_net(z),
    ):
        torch.testing.assert_close(compute(packed), compute(plain), **close)
        assert not torch.allclose(compute(packed), compute(other.compute_copy(dtype)), **close), "the old weights"
