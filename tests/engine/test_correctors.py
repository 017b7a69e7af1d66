"""The correctors: shapes, where they start, and that each reads what it claims to read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from specmpc_cli.engine import native
from specmpc_cli.engine.correctors import CORRECTORS, CorrectorDims, build_corrector, packed
from specmpc_cli.types import Visit

DIMS = CorrectorDims(latent_dim=16, action_dim=3, width=32, history=5)


def visit(rows: int = 4, filled: int = 5) -> Visit:
    g = torch.Generator().manual_seed(0)
    z = torch.rand(rows, 16, generator=g)
    history = torch.rand(rows, 5, 51, generator=g)
    history[:, : 5 - filled] = 0
    prior, planned = torch.rand(rows, 3, generator=g), torch.rand(rows, 3, generator=g)
    return Visit(z, torch.rand(rows, 16, generator=g), planned, prior, torch.arange(rows), history)


def trained(arch: str, dims: CorrectorDims = DIMS) -> torch.nn.Module:
    """A corrector whose head is no longer zero."""
    torch.manual_seed(1)
    network = build_corrector(arch, dims).eval()
    torch.nn.init.normal_(network.head.weight)
    return network


@pytest.mark.parametrize("arch", CORRECTORS)
def test_shapes_and_a_modest_start(arch: str) -> None:
    torch.manual_seed(0)
    network = build_corrector(arch, DIMS)
    seen = visit()
    delta, error = network(seen)
    assert delta.shape == (4, 3) and error.shape == (4,) and (error > 0).all()
    # untrained: a gate of sigmoid(−2) towards the policy prior, nothing else; plain distillation starts as the policy prior itself
    share = torch.tensor(1.0) if arch == "distilled" else torch.sigmoid(torch.tensor(-2.0))
    torch.testing.assert_close(delta, share * (seen.prior - seen.planned))


@pytest.mark.compiler
@pytest.mark.parametrize("arch", CORRECTORS)
def test_packed_for_a_cpu_it_computes_the_same(arch: str) -> None:
    assert native.built()
    network = trained(arch).requires_grad_(False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    fast = packed(network)
    for filled in (0, 2, 5):
        for rows in (1, 4):
            seen = visit(rows, filled)
            for ours, theirs in zip(fast(seen), network(seen), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not any(isinstance(part, nn.Linear) for part in fast.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("arch", CORRECTORS)
def test_rows_are_independent(arch: str) -> None:
    network, seen = trained(arch), visit()
    torch.testing.assert_close(network(seen)[0][1:2], network(seen.take(torch.tensor([1])))[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", CORRECTORS)
@pytest.mark.parametrize("oldest", [7, 500])
def test_plans_older_than_those_of_the_data_count_as_the_oldest_of_them(arch: str, oldest: int) -> None:
    """Ages have embeddings up to `max_age`, and of those beyond the data none was ever fitted."""
    network, seen = trained(arch, replace(DIMS, oldest_age=oldest)), visit()
    last = min(oldest, DIMS.max_age - 1)
    younger, old, older = (replace(seen, age=torch.full((4,), age)) for age in (last - 1, last, 1000))
    assert torch.equal(network(old)[0], network(older)[0])
    assert arch == "distilled" or not torch.equal(network(younger)[0], network(old)[0])


def test_the_two_tower_reads_the_latents_and_the_temporal_one_the_history() -> None:
    seen = visit()
    other_latents, other_history = replace(seen, z=seen.z + 0.1), replace(seen, history=seen.history + 0.1)
    for arch, reads, ignores in (("two-tower", other_latents, other_history), ("temporal", other_history, other_latents)):
        network = trained(arch)
        assert not torch.allclose(network(seen)[0], network(reads)[0])
        assert torch.equal(network(seen)[0], network(ignores)[0])


def test_plain_distillation_sees_the_real_latent_alone() -> None:
    """It is the control of the others, so nothing of the plan may reach its action."""
    network, seen = trained("distilled"), visit()
    blind = replace(seen, z_pred=seen.z_pred + 1, planned=seen.planned + 0.5, age=seen.age + 3, history=seen.history + 1)
    action, other = (network(what)[0] + what.planned for what in (seen, blind))
    torch.testing.assert_close(action, other)
    assert not torch.allclose(action, network(replace(seen, z=seen.z + 0.1))[0] + seen.planned)


def test_plain_distillation_is_as_large_as_the_two_tower() -> None:
    """What it is compared with must not win by size."""
    dims = CorrectorDims(latent_dim=128, action_dim=6, width=256, history=8)
    sizes = {arch: sum(p.numel() for p in build_corrector(arch, dims).parameters()) for arch in ("two-tower", "distilled")}
    assert abs(sizes["distilled"] / sizes["two-tower"] - 1) < 0.1, sizes


def test_the_temporal_corrector_does_not_look_at_empty_slots() -> None:
    """A masked slot's position embedding must not leak into the answer."""
    network, seen = trained("temporal"), visit(filled=2)
    before = network(seen)[0]
    with torch.no_grad():
        network.position[:3] += 10.0
    torch.testing.assert_close(network(seen)[0], before)


def test_the_temporal_corrector_survives_an_empty_history() -> None:
    delta, error = trained("temporal")(visit(filled=0))
    assert torch.isfinite(delta).all() and torch.isfinite(error).all()
