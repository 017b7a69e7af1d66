"""Training on pointmass: what it does in which order, what it leaves, and how it fails."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from specmpc_cli.config.presets import load_config
from specmpc_cli.data.replay import read_replay_shards
from specmpc_cli.engine.checkpoint import load_world_model
from specmpc_cli.engine.planner import Kernels
from specmpc_cli.envs.registry import lookup
from specmpc_cli.errors import ActionNotFinite, ConfigError, TrainingDiverged
from specmpc_cli.learning.learner import UpdateInfo
from specmpc_cli.runtime import choose_runtime
from specmpc_cli.workflows.store import Store
from specmpc_cli.workflows.train import begin_training
from specmpc_cli.workflows.train_log import Watcher
from tests.workflows.pointmass_training import SMALL, STEPS, Killed, assert_same_training, begin, kill_at, lines, teacher

pytestmark = pytest.mark.usefixtures("tiny_models")


def test_phases_updates_and_evaluations_come_when_they_should(straight: Path) -> None:
    episodes = [line for line in lines(straight) if line["event"] == "episode"]
    assert [line["decisions"] for line in episodes] == [40, 80, 120, 160, 200]
    assert [line["planner_calls"] for line in episodes] == [0, 0, 40, 40, 40]
    assert [line["updates"] for line in episodes] == [0, 0, 14, 24, 34]  # 4 at once, then one for every fourth decision
    assert all("value_loss" in line for line in episodes[2:])
    evaluations = [line for line in lines(straight) if line["event"] == "eval"]
    assert [line["decisions"] for line in evaluations] == [120, 200] and all(len(line["returns"]) == 1 for line in evaluations)


def test_the_teacher_is_there_with_its_config_and_curve(straight: Path) -> None:
    store = Store(straight, "pointmass")
    made = store.teacher()
    assert made.source == "store" and made.config["origin"]["decisions"] == STEPS and made.config["origin"]["size"] == 1
    assert made.config["origin"]["return"] == lines(straight)[-1]["return_mean"]
    model, _ = load_world_model(teacher(straight) / "model.safetensors")
    assert model.dims.obs_dim == 4
    assert (teacher(straight) / "training.png").stat().st_size > 10_000


def test_demonstrations_come_first_and_are_learnt_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specmpc_cli.workflows.training.make_script", lambda task: lambda obs: np.full(2, 0.5, np.float32))
    settings = [*SMALL, "train.demonstrations=3", "train.demonstration_noise=0"]
    for root, kill in (("a", None), ("b", 50)):
        if kill:
            with pytest.raises(Killed):
                begin(tmp_path / root, settings=settings, num_envs=2, steps=280).run(280, Watcher(kill_at(kill)))
        begin(tmp_path / root, settings=settings, num_envs=2, steps=280).run(280, Watcher())
    assert_same_training(tmp_path / "b", tmp_path / "a", episodes=7)
    replay = list(read_replay_shards(teacher(tmp_path / "a") / "resume" / "replay", 7))
    assert [bool((episode.action == 0.5).all()) for episode in replay] == [True] * 3 + [False] * 4
    episodes = [line for line in lines(tmp_path / "a") if line["event"] == "episode"]
    assert [line["actor"] for line in episodes] == ["script"] * 3 + ["random"] * 2 + ["planner"] * 2


def test_a_task_without_a_script_cannot_be_demonstrated(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pointmass has no scripted policy"):
        begin(tmp_path / "store", settings=[*SMALL, "train.demonstrations=3"], steps=1000)
    assert not (tmp_path / "store").exists()


def test_several_environments_learn_at_the_same_rate_and_continue(tmp_path: Path) -> None:
    begin(tmp_path / "a", num_envs=3).run(STEPS, Watcher())
    with pytest.raises(Killed):
        begin(tmp_path / "b", num_envs=3).run(STEPS, Watcher(kill_at(130)))
    begin(tmp_path / "b").run(STEPS, Watcher())
    assert_same_training(tmp_path / "b", tmp_path / "a", episodes=5)
    episodes = [line for line in lines(tmp_path / "a") if line["event"] == "episode"]
    # Two random episodes as with one environment, then rounds of three.
    assert [line["decisions"] for line in episodes] == [80] * 2 + [200] * 3
    assert [line["updates"] for line in episodes] == [0] * 2 + [4 + 120 // 4] * 3


def test_speculative_acting_plans_less(tmp_path: Path) -> None:
    begin(tmp_path, settings=[*SMALL, "train.acting.horizon=4", "train.acting.num_samples=8"]).run(120, Watcher())
    assert [line["planner_calls"] for line in lines(tmp_path) if line["event"] == "episode"] == [0, 0, 10]


def test_the_policy_prior_takes_its_share_of_the_rounds(tmp_path: Path) -> None:
    begin(tmp_path, settings=[*SMALL, "train.acting.policy_share=0.5"], steps=320).run(320, Watcher())
    episodes = [line for line in lines(tmp_path) if line["event"] == "episode"]
    assert [line["actor"] for line in episodes] == ["random", "random", *["planner", "policy"] * 3]
    assert [line["planner_calls"] for line in episodes] == [0, 0, 40, 0, 40, 0, 40, 0]


def test_it_learns_pointmass(tmp_path: Path) -> None:
    """Real learning, in small: better than random by far after 400 decisions."""
    settings = ["train.seed_steps=400", "train.batch_size=64", "train.seed_updates=300", "train.updates_per_decision=1", "train.lr=0.001",
                "planner.num_samples=64", "planner.num_elites=8", "planner.num_pi_trajs=8", "planner.iterations=3",
                "train.eval_every=1000"]  # fmt: skip
    begin(tmp_path, settings=settings, steps=600).run(600, Watcher())
    random = np.mean([line["return"] for line in lines(tmp_path) if line["event"] == "episode"][:10])
    assert lines(tmp_path)[-1]["return_mean"] > random + 5


def test_seed_steps_follow_the_published_rule() -> None:
    config = load_config()
    assert config.train.seed_phase(lookup("walker-walk").spec.decisions) == 2500
    assert config.train.seed_phase(lookup("mw-assembly").spec.decisions) == 1000


def test_a_compiler_that_fails_leaves_the_training_eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("no space for the compiler")

    kernels = Kernels(broken, broken)  # type: ignore[arg-type]
    monkeypatch.setattr("specmpc_cli.engine.compiled.compiled_kernels", lambda: kernels)
    runtime = replace(choose_runtime("cpu", "fp32"), compiled=True)
    trainer = begin_training(Store(tmp_path, "pointmass"), runtime, steps=120, seed=0, settings=SMALL)
    problem = trainer.prepare()
    assert problem and "no space for the compiler" in problem and not trainer.runtime.compiled
    trainer.run(120, Watcher())


def test_nothing_is_overwritten_or_made_up(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no training to resume"):
        begin(tmp_path, resume=True)
    with pytest.raises(ConfigError, match="--steps must exceed the 80 decisions of the seed phase"):
        begin(tmp_path, steps=80)
    with pytest.raises(ConfigError, match="--size must be one of 1, 5, 19, 48, 317, got 2"):
        begin(tmp_path, size=2)
    with pytest.raises(ConfigError, match="take fewer environments"):
        begin(tmp_path, num_envs=100)
    begin(tmp_path).run(120, Watcher())
    before = (teacher(tmp_path) / "model.safetensors").read_bytes()
    Store(tmp_path, "pointmass").resume_folder().rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="holds a teacher that no training can continue"):
        begin(tmp_path)
    begin(tmp_path, resume=False)
    assert (teacher(tmp_path) / "model.safetensors").read_bytes() == before  # until the new training's first checkpoint


@pytest.mark.parametrize("broken", ["loss", "action"])
def test_divergence_leaves_a_diagnosis_and_names_the_checkpoint(tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = begin(tmp_path)
    trainer.run(160, Watcher())
    good = (Store(tmp_path, "pointmass").resume_folder() / "state.safetensors").read_bytes()
    if broken == "loss":
        update = trainer.learner.update
        nan = torch.tensor(float("nan"))
        monkeypatch.setattr(trainer.learner, "update", lambda batch: UpdateInfo(*[*update(batch)[:4], nan, *update(batch)[5:]]))
        expected = "total_loss is nan"
    else:

        def rollout(*args: Any, **options: Any) -> None:
            raise ActionNotFinite("see tests/workflows/test_rollout.py")

        monkeypatch.setattr("specmpc_cli.workflows.training.rollout", rollout)
        expected = "an action is not finite"
    with pytest.raises(TrainingDiverged, match=f"{expected}.*after 160 decisions, is intact"):
        trainer.run(STEPS, Watcher())
    monkeypatch.undo()
    folder = Store(tmp_path, "pointmass").resume_folder()
    diagnosis = json.loads((folder / "diagnosis.json").read_text())
    assert expected in diagnosis["what"] and diagnosis["counters"]["decisions"] >= 160
    assert (folder / "state.safetensors").read_bytes() == good
    begin(tmp_path).run(STEPS, Watcher())  # the checkpoint was good
