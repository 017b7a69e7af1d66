"""Our world model and planner against the official TD-MPC2: recorded inputs, draws and outputs.

SPECMPC_VECTORS names another folder of the same format; the default is the copy in tests/data/vectors.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from specmpc_cli.engine import native
from specmpc_cli.engine.compiled import compiled_kernels
from specmpc_cli.engine.official import load_official, read_official
from specmpc_cli.engine.planner import EAGER, PlannerNoise, PlannerSettings, Search, plan, prior_rollouts
from specmpc_cli.engine.world_model import WorldModel, WorldModelDims
from specmpc_cli.learning.learner import Learner, LearnerSettings
from specmpc_cli.learning.losses import Batch, LossSettings, UpdateNoise, draw_policy
from specmpc_cli.runtime import Runtime

VECTORS = Path(os.environ.get("SPECMPC_VECTORS") or Path(__file__).parent / "data" / "vectors")
NAMES = sorted(path.name.removesuffix(".json") for path in VECTORS.glob("*.json"))
LAYOUTS = (".pt", ".old-format.pt")
CHECKPOINTS = [(name, VECTORS / (name + layout)) for name in NAMES for layout in LAYOUTS if (VECTORS / (name + layout)).exists()]
CASES = [(name, path) for name, path in CHECKPOINTS if (VECTORS / f"{name}.forward.npz").exists()]
UPDATES = [(name, path) for name, path in CHECKPOINTS if (VECTORS / f"{name}.update.npz").exists()]
FORWARD, PLAN, UPDATE = 1e-5, 1e-4, 1e-4  # tolerances
DEFAULTS = WorldModelDims(1, 1, 8, 8, 8, 2, 2)


class Case:
    """A checkpoint with its configuration and recorded values, cut to the dimensions of its task."""

    def __init__(self, name: str, checkpoint: Path) -> None:
        self.config: dict[str, Any] = json.loads((VECTORS / f"{name}.json").read_text())
        self.values = np.load(VECTORS / f"{name}.forward.npz")
        self.member = self.config["task_index"]
        self.action_dim = self.config["action_dim"] if self.member is None else self.config["action_dims"][self.member]
        self.discount = self.config["discount"] if self.member is None else self.config["discount"][self.member]
        self.whole = read_official(checkpoint, unstated(self.config)).requires_grad_(False)
        self.model: WorldModel = member_of(self.whole, checkpoint, self.config, self.action_dim).requires_grad_(False)

    def get(self, name: str) -> Tensor:
        return torch.from_numpy(self.values[name])

    def action(self, name: str) -> Tensor:
        """A recorded value whose last axis is the action, without its padding."""
        return self.get(name)[..., : self.action_dim]


def close(ours: Tensor, recorded: Tensor, tolerance: float = FORWARD) -> None:
    """Equal within the tolerance, which is relative above 1."""
    torch.testing.assert_close(ours, recorded, rtol=tolerance, atol=tolerance)


def unstated(config: dict[str, Any]) -> dict[str, Any]:
    """What no tensor tells of a recording; nothing where all of it is the official default, as in files that users import."""
    names = ("simnorm_dim", "vmin", "vmax", "log_std_min", "log_std_max")
    return {name: config[name] for name in names if config[name] != getattr(DEFAULTS, name)}


def member_of(whole: WorldModel, checkpoint: Path, config: dict[str, Any], action_dim: int) -> WorldModel:
    """The single-task model that acts: as a user imports it, where the tensors tell all of it."""
    if not unstated(config):
        return load_official(checkpoint, obs_dim=config["obs_dim"], action_dim=action_dim, member=config["task_index"])
    return whole if config["task_index"] is None else whole.member(config["task_index"], config["obs_dim"], action_dim)


def expect_dims(model: WorldModel, config: dict[str, Any]) -> None:
    """Every size that was read off the tensors, and the ranges, are those of the recording."""
    names = ("latent_dim", "mlp_dim", "enc_dim", "num_q", "episodic", "num_bins", "vmin", "vmax", "simnorm_dim", "task_dim")
    for name in (*names, "log_std_min", "log_std_max"):
        assert getattr(model.dims, name) == pytest.approx(config[name], rel=1e-6), name
    assert model.dims.num_enc_layers == max(config["num_enc_layers"], 2)  # the official code builds two for 1 as well


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case[1].name)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(*request.param)


def test_there_are_vectors() -> None:
    assert CASES or UPDATES, f"no recorded values in {VECTORS}"
    recorded = {path.name.removesuffix(f".{kind}.npz") for kind in ("forward", "update") for path in VECTORS.glob(f"*.{kind}.npz")}
    if left_out := sorted(recorded - {name for name, _ in CHECKPOINTS}):
        pytest.skip(f"left out, for they have no .json or no .pt of their name: {', '.join(left_out)}")


def test_forward_passes(case: Case) -> None:
    """The whole model, which for a task set has an embedding and masks."""
    model = case.whole
    expect_dims(model, case.config)
    z, a = case.get("z"), case.get("in_action")
    task = None if case.member is None else torch.full((len(z),), case.member)
    close(model.encode(case.get("in_obs"), task), z)
    close(model.next(z, a, task), case.get("z_next"))
    za = torch.cat([model.with_task(z, task), a], dim=-1)
    close(model.reward_net(za), case.get("reward_logits"))
    close(model.decode(model.reward_net(za)).unsqueeze(-1), case.get("reward"))
    close(model.q.logits(za.unsqueeze(0), None), case.get("q_logits"))
    for ensemble, recorded in ((model.q, "q_values"), (model.q_target, "q_target_values")):
        close(model.decode(ensemble.logits(za.unsqueeze(0), None)).unsqueeze(-1), case.get(recorded))
    close(model.pi_sample(z, case.get("pi_eps"), task), case.get("pi_action"))
    mean, log_std = model.pi(z, task)
    close(torch.tanh(mean), case.get("pi_mean"))
    close(log_std, case.get("pi_log_std"))
    action, entropy, scaled_entropy = draw_policy(model, z, case.get("pi_eps"), task)
    close(action, case.get("pi_action"))
    close(entropy.unsqueeze(-1), case.get("pi_entropy"))
    close(scaled_entropy.unsqueeze(-1), case.get("pi_scaled_entropy"))
    if model.termination_net is not None:
        logit = model.termination_net(model.with_task(z, task))
        close(torch.sigmoid(logit), case.get("termination_prob"))


def test_forward_passes_as_they_act(case: Case) -> None:
    """The single-task model that plans: for a task set, one member without embedding and padding."""
    model, z = case.model, case.get("z")
    close(model.encode(case.get("in_obs")), z)
    close(model.pi_sample(z, case.action("pi_eps")), case.action("pi_action"))
    close(model.pi_mean(z), case.action("pi_mean"))
    if model.termination_net is not None:
        assert torch.equal(model.terminates(z), (case.get("termination_prob").squeeze(-1) > 0.5).float())
    padding = case.get("in_action")[..., case.action_dim :]
    if bool((padding != 0).any()):
        return  # recorded with values in the padding, which no single task can produce; the whole model has been compared above
    a = case.action("in_action")
    close(model.next(z, a), case.get("z_next"))
    close(model.reward(z, a).unsqueeze(-1), case.get("reward"))
    za = torch.cat([z, a], -1).unsqueeze(0)
    for ensemble, recorded in ((model.q, "q_values"), (model.q_target, "q_target_values")):
        values = torch.stack([model.decode(ensemble.logits(za, head)) for head in range(model.dims.num_q)])
        close(values.squeeze(1).unsqueeze(-1), case.get(recorded))


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.compiler)], ids=["formulas", "packed"])
@pytest.mark.parametrize("kind", ["first", "warm", "noisy"])
def test_whole_plans(case: Case, kind: str, packed: bool) -> None:
    names = ("horizon", "iterations", "num_samples", "num_elites", "num_pi_trajs", "min_std", "max_std", "temperature")
    settings = PlannerSettings(discount=case.discount, **{name: case.config[name] for name in names})

    def draw(name: str) -> Tensor:
        return case.action(f"plan_{kind}_draw_{name}").unsqueeze(0)

    noise = PlannerNoise(
        prior_eps=draw("prior_eps").transpose(1, 2),
        sample_eps=draw("sample_eps").transpose(2, 3),
        terminal_eps=draw("terminal_eps"),
        q_index=case.get(f"plan_{kind}_draw_q_index").unsqueeze(0),
        exponential=case.get(f"plan_{kind}_draw_gumbel_exponential").unsqueeze(0),
        action_eps=draw("action_eps") if kind == "noisy" else None,
    )
    previous = case.action(f"plan_{kind}_prev_mean")
    warm_start = torch.zeros_like(previous)
    if kind != "first":
        warm_start[:-1] = previous[1:]
    searches: list[Search] = []
    z = case.model.encode(case.get(f"plan_{kind}_obs"))
    model, kernels = case.model, EAGER
    if packed:
        model, kernels = case.model.compute_copy(torch.float32), compiled_kernels()
        model.pack()
        assert model.packed, native.problem()
    made = plan(model, z, warm_start.unsqueeze(0), noise, settings, kernels=kernels, on_iteration=searches.append)

    values = torch.stack([search.values[0] for search in searches]).unsqueeze(-1)
    torch.testing.assert_close(values, case.get(f"plan_{kind}_values"), rtol=PLAN, atol=PLAN)
    last = searches[-2] if len(searches) > 1 else None  # what the last iteration draws from
    mean, std = (last.mean[0], last.std[0]) if last else (warm_start, torch.tensor(settings.max_std))  # [H, A]
    prior = prior_rollouts(case.model, z, noise.prior_eps, settings.discount).actions[0]  # [P, H, A]
    candidates = torch.cat([prior, (mean + std * noise.sample_eps[0, -1]).clamp(-1, 1)]).transpose(0, 1)
    torch.testing.assert_close(candidates, case.action(f"plan_{kind}_last_candidates"), rtol=0, atol=PLAN)
    torch.testing.assert_close(made.mean[0], case.action(f"plan_{kind}_mean"), rtol=0, atol=PLAN)
    torch.testing.assert_close(made.actions[0, 0], case.action(f"plan_{kind}_action"), rtol=0, atol=PLAN)


@pytest.mark.parametrize("kernels", [False, pytest.param(True, marks=pytest.mark.compiler)], ids=["formulas", "kernels"])
@pytest.mark.parametrize("recording", UPDATES, ids=lambda recording: recording[1].name)
def test_two_updates(recording: tuple[str, Path], kernels: bool) -> None:
    name, checkpoint = recording
    config: dict[str, Any] = json.loads((VECTORS / f"{name}.json").read_text())
    values = np.load(VECTORS / f"{name}.update.npz")

    def get(key: str) -> Tensor:
        return torch.from_numpy(values[key])

    model = read_official(checkpoint, unstated(config))
    expect_dims(model, config)
    names = ("rho", "consistency_coef", "reward_coef", "value_coef", "termination_coef", "entropy_coef", "tau")
    discounts = config["discount"] if config["multitask"] else None
    losses = LossSettings(discount=0.0 if discounts else config["discount"], **{name: config[name] for name in names})
    settings = LearnerSettings(lr=config["lr"], enc_lr_scale=config["enc_lr_scale"], grad_clip_norm=config["grad_clip_norm"], dropout=0.0)
    assert not kernels or native.built(), native.problem()
    runtime = Runtime(torch.device("cpu"), torch.float32, compiled=kernels, threads=1)
    learner = Learner(model, losses, settings, runtime, seed=0, discounts=discounts)
    learner.scale.fill_(float(get("scale_before")))
    batch = Batch(
        get("batch_obs"),
        get("batch_action"),
        get("batch_reward").squeeze(-1),
        get("batch_terminated").squeeze(-1),
        get("batch_task") if config["multitask"] else None,
    )
    for step in range(2):
        draws = ("td_eps", "td_q_index", "pi_eps", "pi_q_index")
        info = learner.step(batch, UpdateNoise(*(get(f"step{step}_draw_{draw}") for draw in draws)))
        for key, value in info._asdict().items():
            recorded = get(f"step{step}_info_{key}")
            torch.testing.assert_close(
                value, recorded, rtol=UPDATE, atol=UPDATE, msg=lambda text, what=f"update {step}: {key}": what + text
            )
    close(learner.scale, get("scale_after").squeeze(), UPDATE)
    path = VECTORS / f"{name}.after2updates.pt"
    if path.exists():
        after = read_official(path, unstated(config)).state_dict()
        for key, value in model.state_dict().items():
            torch.testing.assert_close(value, after[key], rtol=UPDATE, atol=UPDATE, msg=lambda text, key=key: key + text)
