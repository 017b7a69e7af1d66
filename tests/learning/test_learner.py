"""The learner: what an update changes, what it draws, and that it continues where it was left. Parity: tests/test_parity.py."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from specmpc_cli.engine import native
from specmpc_cli.engine.twohot import two_hot, two_hot_inv, two_hot_loss
from specmpc_cli.engine.world_model import WorldModel, WorldModelDims
from specmpc_cli.learning.gradients import AutogradGradients, KernelGradients
from specmpc_cli.learning.learner import Learner, LearnerSettings, draw_dropout
from specmpc_cli.learning.losses import Batch, LossSettings, percentile_range
from specmpc_cli.runtime import Runtime, choose_runtime
from tests.conftest import make_model

CPU = torch.device("cpu")
HORIZON, SIZE = 3, 16


def make_learner(
    *, seed: int = 0, dtype: str = "fp32", num_q: int = 3, dropout: float = 0.01, episodic: bool = False, demonstrated: bool = False
) -> Learner:
    model, settings = make_model(num_q=num_q, episodic=episodic), LearnerSettings(dropout=dropout)
    return Learner(model, LossSettings(0.97), settings, choose_runtime("cpu", dtype), seed=seed, demonstrated=demonstrated)


def make_batch(seed: int = 0) -> Batch:
    """Dynamics and rewards that can be learned: the observation moves with the action."""
    generator = torch.Generator().manual_seed(seed)
    obs = [torch.randn(SIZE, 4, generator=generator)]
    action = torch.rand(HORIZON, SIZE, 2, generator=generator) * 2 - 1
    for step in action:
        obs.append(obs[-1] + 0.1 * torch.cat([step, -step], dim=1))
    return Batch(torch.stack(obs), action, action.sum(-1), torch.zeros(HORIZON, SIZE))


def weights(learner: Learner) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in learner.model.state_dict().items()}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_update_moves_every_network_and_the_target_only_a_little(dtype: str) -> None:
    learner = make_learner(dtype=dtype)
    before = weights(learner)
    learner.update(make_batch())
    after = weights(learner)
    moved = {name: float((after[name] - before[name]).abs().max()) for name in before}
    assert all(distance > 0 for distance in moved.values()), [name for name, distance in moved.items() if distance == 0]
    for name in (name for name in moved if name.startswith("q.")):
        twin = name.replace("q.", "q_target.", 1)
        torch.testing.assert_close(after[twin], torch.lerp(before[twin], after[name], 0.01))


def test_the_policy_loss_leaves_the_value_heads_alone() -> None:
    """Without the world model's loss, an update changes nothing but the policy (and the target, which follows)."""
    learner = make_learner()
    nothing = LossSettings(0.97, consistency_coef=0, reward_coef=0, value_coef=0, tau=0.0)
    learner = Learner(learner.model, nothing, LearnerSettings(), choose_runtime("cpu", "fp32"), seed=0)
    before = weights(learner)
    learner.update(make_batch())
    moved = {name for name, value in weights(learner).items() if not torch.equal(value, before[name])}
    assert moved and all(name.startswith("pi_net.") for name in moved)
    assert all(parameter.requires_grad for parameter in learner.model.q.parameters())


def test_losses_fall_on_data_that_can_be_learned() -> None:
    learner, batch = make_learner(), make_batch()
    first = learner.update(batch)
    for _ in range(100):
        last = learner.update(batch)
    assert last.consistency_loss < 0.7 * first.consistency_loss
    assert last.reward_loss < 0.85 * first.reward_loss and last.value_loss < 0.95 * first.value_loss


def test_an_update_depends_on_the_seed_and_its_number_only() -> None:
    runs = []
    for noise in range(2):
        learner = make_learner()
        for number in range(3):
            torch.manual_seed(1000 * noise + number)  # what others do to torch's generator does not matter
            learner.update(make_batch(number))
        runs.append(weights(learner))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    other = make_learner(seed=1)
    for number in range(3):
        other.update(make_batch(number))
    assert not torch.equal(weights(other)["pi_net.0.weight"], runs[0]["pi_net.0.weight"])


def test_rehearsing_learns_nothing_and_changes_no_draw() -> None:
    rehearsed, plain = make_learner(), make_learner()
    rehearsed.rehearse(SIZE, HORIZON)
    assert all(parameter.grad is None for parameter in rehearsed.model.parameters()) and rehearsed.updates == 0
    for learner in (rehearsed, plain):
        learner.update(make_batch())
    expected = weights(plain)
    assert all(torch.equal(value, expected[name]) for name, value in weights(rehearsed).items())


def test_it_continues_bit_for_bit() -> None:
    straight = make_learner()
    for number in range(6):
        straight.update(make_batch(number))
    halves = make_learner()
    for number in range(3):
        halves.update(make_batch(number))
    state = {name: value.clone() for name, value in halves.state_dict().items()}
    continued = make_learner()
    continued.load_state_dict(state, updates=3)
    for number in range(3, 6):
        continued.update(make_batch(number))
    expected, found = straight.state_dict(), continued.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_state_of_another_model_is_refused() -> None:
    state = make_learner(num_q=2).state_dict()
    with pytest.raises(RuntimeError):
        make_learner(num_q=3).load_state_dict(state, updates=0)


def test_bf16_updates_stay_near_fp32_ones() -> None:
    exact, rough = make_learner(), make_learner(dtype="bf16")
    for number in range(3):
        expected, found = exact.update(make_batch(number)), rough.update(make_batch(number))
    assert all(value.dtype == torch.float32 for value in rough.state_dict().values())
    torch.testing.assert_close(found.total_loss, expected.total_loss, rtol=0.05, atol=0.01)
    assert float(found.total_loss) != float(expected.total_loss)


def test_observations_enter_training_in_full_precision() -> None:
    """10.03 and 10.06 are one number in bf16."""
    model = make_model()
    obs = 10 + 0.03 * torch.arange(3.0).unsqueeze(1).expand(-1, 4)
    exact, met = model.encoder[0](obs), []
    model.encoder[0].register_forward_hook(lambda layer, given, result: met.append(result))
    with torch.autocast("cpu", torch.bfloat16):
        model.encode(obs)
        rounded = model.encoder[0](obs)
    assert torch.equal(met[0], exact) and not torch.equal(exact[0], exact[1]) and torch.equal(rounded[0], rounded[1])


def test_dropout_masks_have_the_share_and_the_scale() -> None:
    torch.manual_seed(0)
    masks = torch.stack([drawn.mask() for _ in range(50) if (drawn := draw_dropout((2, 100, 30), 0.1, CPU)) is not None])
    assert abs(float((masks == 0).float().mean()) - 0.1) < 0.003
    assert abs(float(masks.mean()) - 1.0) < 0.003
    per_place = (masks == 0).float().mean(0)  # the first and the last elements are dropped as often as the others
    assert 0 < float(per_place[0, 0].mean()) < 0.2 and 0 < float(per_place[-1, -1].mean()) < 0.2
    assert draw_dropout((2, 3), 0.0, CPU) is None


def test_two_hot_decodes_to_what_it_encoded_and_its_loss_is_the_cross_entropy() -> None:
    x = torch.tensor([-20000.0, -3.2, 0.0, 0.017, 1.0, 12.5, 20000.0])
    coded = two_hot(x, -10.0, 10.0, 101)
    torch.testing.assert_close(coded.sum(-1), torch.ones(7))
    assert ((coded > 0).sum(-1) <= 2).all()
    decoded = two_hot_inv(torch.log(coded + 1e-30), -10.0, 10.0)
    torch.testing.assert_close(decoded, x, rtol=0.02, atol=1e-3)  # symexp of the mean bin: nearly exact inside a bin
    logits = torch.randn(7, 101, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(two_hot_loss(logits, x, -10.0, 10.0), torch.nn.functional.cross_entropy(logits, coded, reduction="none"))


def test_percentile_range_interpolates() -> None:
    x = torch.randn(57, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(percentile_range(x), x.quantile(0.95) - x.quantile(0.05))


TASKS = torch.arange(SIZE) % 3


def make_task_set_learner() -> Learner:
    torch.manual_seed(0)
    model = WorldModel(WorldModelDims(4, 2, 16, 24, 24, 2, num_q=3, num_tasks=4, task_dim=5))
    model.action_masks[1, 1] = 0.0  # the second task has one action dimension
    return Learner(model, LossSettings(0.0), LearnerSettings(), choose_runtime("cpu", "fp32"), seed=0, discounts=(0.9, 0.95, 0.97, 0.99))


LEARNERS = {
    "one task": make_learner,
    "two heads": partial(make_learner, num_q=2),
    "one that terminates": partial(make_learner, episodic=True),
    "demonstrations": partial(make_learner, demonstrated=True),
    "a task set": make_task_set_learner,
}
COMPILED = Runtime(CPU, torch.float32, compiled=True, threads=1)


def fields_of(name: str) -> dict[str, Tensor | None]:
    """What a batch of these learners has beside the others' fields."""
    if name == "one that terminates":
        return {"terminated": (torch.arange(HORIZON * SIZE) % 5 == 0).float().view(HORIZON, SIZE)}
    if name == "demonstrations":
        return {"demonstrated": (torch.arange(SIZE) % 2).float()}
    return {"task": TASKS if name == "a task set" else None}


@pytest.mark.compiler
@pytest.mark.parametrize("name", [*LEARNERS, "a task set, by torch's compiler"])
def test_compiled_updates_agree_with_eager_ones(name: str) -> None:
    name, *by_torch = name.split(", by")
    eager, compiled = LEARNERS[name](), LEARNERS[name]()
    assert native.built(), native.problem()
    kind = AutogradGradients if by_torch else KernelGradients
    compiled._gradients = kind(compiled.model, compiled._losses, compiled._discounts, COMPILED)
    compiled.rehearse(SIZE, HORIZON)
    compilations = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for number in range(3):
        batch = make_batch(number)._replace(**fields_of(name))
        expected, found = eager.update(batch), compiled.update(batch)
        for part, value in expected._asdict().items():
            torch.testing.assert_close(getattr(found, part), value, rtol=1e-4, atol=1e-5, msg=part)
    expected, found = eager.state_dict(), compiled.state_dict()
    for part, value in expected.items():
        torch.testing.assert_close(found[part], value, rtol=0, atol=1e-4, msg=part)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compilations, "the rehearsal compiled something else"


@pytest.mark.compiler
@pytest.mark.parametrize("change", ["continued", "threads"])
def test_updates_by_kernels_are_the_same_to_the_bit(change: str) -> None:
    """As training runs: dropout, gradients and Adam by kernels, continued from a state or not, on one thread or several."""
    found, threads = [], torch.get_num_threads()
    for changed in (False, True):
        learner = make_compiled_learner()
        torch.set_num_threads(3 if changed and change == "threads" else 1)
        try:
            for number in range(4):
                if changed and change == "continued" and number == 2:
                    state = {name: value.clone() for name, value in learner.state_dict().items()}
                    learner = make_compiled_learner()
                    learner.load_state_dict(state, updates=2)
                learner.update(make_batch(number))
        finally:
            torch.set_num_threads(threads)
        assert isinstance(learner._gradients, KernelGradients) and learner._world_adam.by_kernel
        found.append(learner.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.compiler
def test_a_learner_that_gives_up_kernels_goes_on_from_where_it_is() -> None:
    eager, given_up = make_learner(), make_compiled_learner()
    for number in range(2):
        eager.update(make_batch(number))
        given_up.update(make_batch(number))
    given_up.compute_eagerly()
    found, expected = given_up.update(make_batch(2)), eager.update(make_batch(2))
    assert isinstance(given_up._gradients, AutogradGradients) and not given_up._world_adam.by_kernel
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def make_compiled_learner() -> Learner:
    assert native.built(), native.problem()
    return Learner(make_model(num_q=3), LossSettings(0.97), LearnerSettings(), COMPILED, seed=0)


@pytest.mark.compiler
def test_updates_by_kernels_in_bf16_are_near_those_in_fp32() -> None:
    assert native.built(), native.problem()
    exact, rounded = make_learner(), make_learner()
    rounded._gradients = KernelGradients(rounded.model, rounded._losses, None, replace(COMPILED, dtype=torch.bfloat16))
    for number in range(3):
        expected, found = exact.update(make_batch(number)), rounded.update(make_batch(number))
        for part, value in expected._asdict().items():
            torch.testing.assert_close(getattr(found, part), value, rtol=0.03, atol=1e-3, msg=part)
    assert not torch.equal(found.total_loss, expected.total_loss)


def test_a_task_set_is_learned_task_by_task() -> None:
    """The embeddings of the batch's tasks move and stay within the unit ball; one of no batch stays where it is, however long."""
    learner = make_task_set_learner()
    assert learner.model.task_emb is not None
    with torch.no_grad():
        learner.model.task_emb.weight.mul_(1000)
    before = weights(learner)["task_emb.weight"]
    for _ in range(3):
        learner.update(make_batch()._replace(task=TASKS))
    after = weights(learner)["task_emb.weight"]
    assert torch.equal(after[3], before[3]) and before[3].norm() > 1
    assert (after[:3].norm(dim=1) <= 1.01).all() and (before[:3].norm(dim=1) > 1).all()


def test_action_dimensions_that_a_task_lacks_change_nothing() -> None:
    learner = make_task_set_learner()
    z, task = torch.rand(SIZE, 16), TASKS
    eps = torch.randn(SIZE, 2)
    other = torch.where(learner.model.action_masks[task] == 0, 7.0, eps)
    assert torch.equal(learner.model.pi_sample(z, eps, task), learner.model.pi_sample(z, other, task))
    assert (learner.model.pi_sample(z, eps, task)[task == 1, 1] == 0).all()


def test_a_task_set_continues_bit_for_bit() -> None:
    batch = make_batch()._replace(task=TASKS)
    whole = make_task_set_learner()
    for _ in range(4):
        whole.update(batch)
    first = make_task_set_learner()
    for _ in range(2):
        first.update(batch)
    second = make_task_set_learner()
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()}, updates=2)
    for _ in range(2):
        second.update(batch)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in second.state_dict().items())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_captured_updates_on_a_gpu_are_the_eager_ones(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keyed draws are the same, so weights agree; also when a training continues and must warm up again before the capture."""
    monkeypatch.setattr("specmpc_cli.engine.captured.EAGER_CALLS", 10**9)
    batches = [Batch(*(value.cuda() for value in make_batch(number) if value is not None)) for number in range(8)]
    eager = Learner(make_model(num_q=3), LossSettings(0.97), LearnerSettings(), choose_runtime("cuda", dtype), seed=0)
    for batch in batches[:4]:
        eager.update(batch)
    state = {name: value.clone() for name, value in eager.state_dict().items()}
    for batch in batches[4:]:
        eager.update(batch)
    monkeypatch.undo()
    captured = Learner(make_model(num_q=3), LossSettings(0.97), LearnerSettings(), choose_runtime("cuda", dtype), seed=0)
    captured.load_state_dict(state, updates=4)
    for batch in batches[4:]:
        captured.update(batch)
    assert captured._call._graph is not None
    expected, found = eager.state_dict(), captured.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5 if dtype == "fp32" else 1e-3, msg=name)


@pytest.mark.gpu
def test_a_task_sets_updates_are_captured_too() -> None:
    torch.manual_seed(0)
    model = WorldModel(WorldModelDims(4, 2, 16, 24, 24, 2, num_q=3, num_tasks=4, task_dim=5))
    runtime = choose_runtime("cuda", "fp32")
    learner = Learner(model, LossSettings(0.0), LearnerSettings(), runtime, seed=0, discounts=(0.9, 0.95, 0.97, 0.99))
    on_gpu = [value.cuda() for value in make_batch() if value is not None]
    losses = [float(learner.update(Batch(*on_gpu, TASKS.cuda())).total_loss) for _ in range(6)]
    assert learner._call._graph is not None and losses[-1] < losses[0]


def test_the_policy_prior_imitates_what_was_demonstrated_and_nothing_else() -> None:
    torch.manual_seed(0)
    settings = LearnerSettings(lr=3e-3, dropout=0.0)
    losses = LossSettings(0.97, demonstration_coef=10.0)
    learner = Learner(make_model(), losses, settings, choose_runtime("cpu", "fp32"), seed=0, demonstrated=True)
    plain = make_batch(0)
    shown = torch.arange(SIZE) % 2 == 0
    target = torch.where(shown[:, None], 0.7, -0.7).expand(HORIZON, SIZE, plain.action.shape[-1])
    batch = plain._replace(action=target, demonstrated=shown.float())
    for _ in range(150):
        learner.update(batch)
    with torch.no_grad():
        z = learner.model.encode(batch.obs[0])
        distance = (learner.model.pi_sample(z, torch.randn(SIZE, 2)) - target[0]).abs().mean(-1)  # [B]
    assert float(distance[shown].mean()) < 0.25 < 0.8 < float(distance[~shown].mean())


def test_imitation_leaves_the_world_model_alone() -> None:
    results = []
    for coef in (0.0, 10.0):
        torch.manual_seed(0)
        learner = Learner(
            make_model(),
            LossSettings(0.97, demonstration_coef=coef),
            LearnerSettings(),
            choose_runtime("cpu", "fp32"),
            seed=0,
            demonstrated=True,
        )
        learner.update(make_batch(0)._replace(demonstrated=torch.ones(SIZE)))
        results.append(learner.model.state_dict())
    same = {name for name in results[0] if torch.equal(results[0][name], results[1][name])}
    assert {name.split(".")[0] for name in results[0].keys() - same} == {"pi_net"}
