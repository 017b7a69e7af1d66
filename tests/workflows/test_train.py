"""Training on pointmass: what it does in which order, that it resumes bit for bit, and how it fails."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from specmpc_cli.config.presets import load_config
from specmpc_cli.data.replay import read_replay_shards
from specmpc_cli.engine.checkpoint import load_world_model
from specmpc_cli.engine.planner import Kernels
from specmpc_cli.engine.world_model import MODEL_SIZES
from specmpc_cli.envs.registry import lookup
from specmpc_cli.errors import ActionNotFinite, CheckpointError, ConfigError, DatasetError, TrainingDiverged
from specmpc_cli.learning.learner import UpdateInfo
from specmpc_cli.runtime import choose_runtime
from specmpc_cli.workflows.store import Store
from specmpc_cli.workflows.train import begin_training, training_report
from specmpc_cli.workflows.train_log import Progress, TrainingLog, Watcher
from specmpc_cli.workflows.train_state import Counters
from specmpc_cli.workflows.training import Trainer, seed_steps

SMALL = [
    "train.seed_steps=80", "train.seed_updates=4", "train.updates_per_decision=0.25", "train.batch_size=8", "train.eval_every=120",
    "train.eval_episodes=1", "train.checkpoint_seconds=0", "planner.num_samples=16", "planner.num_elites=4", "planner.num_pi_trajs=4",
    "planner.iterations=1",
]  # fmt: skip
TINY = {"enc_dim": 32, "num_enc_layers": 2, "mlp_dim": 32, "latent_dim": 16, "num_q": 2}
STEPS = 200  # five episodes of 40 decisions, two of them random


@pytest.fixture(scope="module", autouse=True)
def tiny_models() -> Iterator[None]:
    """Size 1 is tiny here: what is tested does not depend on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODEL_SIZES, 1, TINY)
        yield


class Killed(Exception):
    """Stands for a kill at any moment."""


def kill_at(decision: int) -> Callable[[Progress], None]:
    """A watcher's callback that ends the training there."""

    def kill(progress: Progress) -> None:
        if progress.decisions >= decision:
            raise Killed

    return kill


def begin(root: Path, **options: Any) -> Trainer:
    settings = options.pop("settings", SMALL)
    store = Store(root, "pointmass")
    return begin_training(store, choose_runtime("cpu", "fp32"), steps=options.pop("steps", STEPS), seed=0, settings=settings, **options)


def teacher(root: Path) -> Path:
    return root / "pointmass" / "main" / "teacher"


def lines(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (teacher(root) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that nothing interrupted."""
    root = tmp_path_factory.mktemp("straight")
    begin(root).run(STEPS, Watcher())
    return root


def assert_same_training(root: Path, straight: Path, episodes: int = STEPS // 40) -> None:
    """Weights, optimisers, counters, replay and metrics agree to the last bit."""
    for folder in ("resume/state.safetensors", "model.safetensors"):
        expected, found = load_file(teacher(straight) / folder), load_file(teacher(root) / folder)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    replays = [list(read_replay_shards(teacher(path) / "resume" / "replay", episodes)) for path in (straight, root)]
    for one, other in zip(*replays, strict=True):
        for name in ("obs", "action", "reward", "terminated"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    expected, found = ([{k: v for k, v in line.items() if k != "seconds"} for line in lines(path)] for path in (straight, root))
    assert expected == found


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


@pytest.mark.parametrize("when", [30, 81, 163])
def test_killed_at_any_decision_it_continues_bit_for_bit(tmp_path: Path, straight: Path, when: int) -> None:
    with pytest.raises(Killed):
        begin(tmp_path).run(STEPS, Watcher(kill_at(when)))
    continued = begin(tmp_path)
    assert continued.counters.decisions == when // 40 * 40
    continued.run(STEPS, Watcher())
    assert_same_training(tmp_path, straight)


@pytest.mark.parametrize("write", ["train_state.save", "store.write_whole", "store.save_world_model", "training.plot_training"])
def test_killed_between_two_writes_of_a_checkpoint_it_continues_bit_for_bit(
    tmp_path: Path, straight: Path, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    """The replay's shard, the state, then the teacher's files: whatever is missing is made good by the next run."""

    def kill(*args: Any, **options: Any) -> None:
        raise Killed

    def arm(progress: Progress) -> None:
        if progress.decisions == 119:
            monkeypatch.setattr(f"specmpc_cli.workflows.{write}", kill)

    with pytest.raises(Killed):
        begin(tmp_path).run(STEPS, Watcher(arm))
    monkeypatch.undo()
    begin(tmp_path).run(STEPS, Watcher())
    assert_same_training(tmp_path, straight)


def test_a_finished_training_whose_teacher_was_not_written_writes_it(tmp_path: Path, straight: Path) -> None:
    begin(tmp_path).run(STEPS, Watcher())
    for name in ("model.safetensors", "config.yaml", "metrics.jsonl"):
        (teacher(tmp_path) / name).unlink()
    begin(tmp_path).run(STEPS, Watcher())
    assert_same_training(tmp_path, straight)


def scores(monkeypatch: pytest.MonkeyPatch, returns: dict[int, float]) -> None:
    """Makes the evaluation after so many decisions find that return."""
    evaluation = TrainingLog.evaluation

    def fixed(log: TrainingLog, counters: Counters, stats: Any) -> dict[str, Any]:
        line = evaluation(log, counters, stats)
        line["return_mean"] = returns[counters.decisions]
        return line

    monkeypatch.setattr(TrainingLog, "evaluation", fixed)


def same_weights(one: Path, other: Path, file: str = "model.safetensors") -> bool:
    found, expected = load_file(teacher(one) / file), load_file(teacher(other) / file)
    return all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("when", [None, 130, 190])
def test_the_best_evaluated_weights_are_kept_if_asked_for(
    tmp_path: Path, straight: Path, monkeypatch: pytest.MonkeyPatch, when: int | None
) -> None:
    """Three evaluations, the second of which is the best."""
    scores(monkeypatch, {80: 1.0, 120: 3.0, 160: 2.0, 200: 2.0})
    settings = [*SMALL, "train.keep=best", "train.eval_every=40"]
    if when:
        with pytest.raises(Killed):
            begin(tmp_path / "best", settings=settings).run(STEPS, Watcher(kill_at(when)))
    trainer = begin(tmp_path / "best", settings=settings)
    trainer.run(STEPS, Watcher())
    report = training_report(trainer, Store(tmp_path / "best", "pointmass"))
    assert (report["decisions"], report["teacher_decisions"], report["return_mean"]) == (STEPS, 120, 3.0)

    begin(tmp_path / "short").run(120, Watcher())
    assert same_weights(tmp_path / "best", tmp_path / "short")
    assert same_weights(tmp_path / "best", straight, "resume/state.safetensors")


@pytest.mark.parametrize("write", ["store.write_whole", "store.save_world_model"])
def test_killed_while_the_best_is_written_it_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str) -> None:
    """The checkpoint holds the best weights then, but neither its config nor the older file beside it tells."""
    settings = [*SMALL, "train.keep=best", "train.eval_every=40"]

    def kill(*args: Any, **options: Any) -> None:
        raise Killed

    scores(monkeypatch, {80: 1.0, 120: 3.0, 160: 2.0, 200: 2.0})
    with pytest.MonkeyPatch.context() as patch:
        arm = {119: lambda: patch.setattr(f"specmpc_cli.workflows.{write}", kill)}
        with pytest.raises(Killed):
            begin(tmp_path / "best", settings=settings).run(STEPS, Watcher(lambda progress: arm.pop(progress.decisions, lambda: None)()))
    begin(tmp_path / "best", settings=settings).run(STEPS, Watcher())
    begin(tmp_path / "short").run(120, Watcher())
    assert same_weights(tmp_path / "best", tmp_path / "short")


def test_a_best_teacher_that_was_lost_makes_way_for_the_best_of_those_to_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores(monkeypatch, {120: 3.0, 200: 2.0, 240: 1.0})
    settings = [*SMALL, "train.keep=best"]
    begin(tmp_path, settings=settings).run(STEPS, Watcher())
    (teacher(tmp_path) / "model.safetensors").unlink()
    trainer = begin(tmp_path, settings=settings)
    assert any("the best evaluated weights are gone" in note for note in trainer.notes)
    trainer.run(240, Watcher())
    report = training_report(trainer, Store(tmp_path, "pointmass"))
    assert (report["teacher_decisions"], report["return_mean"]) == (240, 1.0)
    assert Store(tmp_path, "pointmass").teacher().config["origin"]["return"] == 1.0


def test_success_is_better_than_return_and_of_equals_the_later_is_better() -> None:
    log = TrainingLog(has_success=True)
    values = [(10, 0.5, 9.0), (20, 1.0, 2.0), (30, 1.0, 3.0), (40, 1.0, 3.0), (50, 0.9, 8.0)]
    log.lines = [{"event": "eval", "decisions": at, "success_rate": success, "return_mean": mean} for at, success, mean in values]
    assert log.best is not None and log.best["decisions"] == 40
    log.forget_best()
    assert log.best is None


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
    assert seed_steps(config, lookup("walker-walk").spec) == 2500
    assert seed_steps(config, lookup("mw-assembly").spec) == 1000


def test_a_training_of_a_model_with_other_dimensions_cannot_be_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the task's suite was replaced by another version of it."""
    begin(tmp_path).run(STEPS, Watcher())
    monkeypatch.setitem(MODEL_SIZES, 1, {**TINY, "latent_dim": 24})
    with pytest.raises(CheckpointError, match="other dimensions than pointmass has here"):
        begin(tmp_path)


def test_resuming_something_else_says_what_differs(tmp_path: Path) -> None:
    begin(tmp_path).run(120, Watcher())
    with pytest.raises(ConfigError, match="size is 5, was 1"):
        begin(tmp_path, size=5)
    with pytest.raises(ConfigError, match=r"config\.train\.lr is 0\.001, was 0\.0003"):
        begin(tmp_path, settings=[*SMALL, "train.lr=0.001"])
    with pytest.raises(ConfigError, match="num_envs is 2, was 1"):
        begin(tmp_path, num_envs=2)
    resume = Store(tmp_path, "pointmass").resume_folder()
    moved = Store(tmp_path, "cartpole-balance").resume_folder()
    moved.parent.mkdir(parents=True)
    resume.rename(moved)
    with pytest.raises(ConfigError, match="task is cartpole-balance, was pointmass"):
        begin_training(Store(tmp_path, "cartpole-balance"), choose_runtime("cpu", "fp32"), steps=5000, seed=0)


def test_options_left_out_are_those_of_the_saved_training(tmp_path: Path) -> None:
    begin(tmp_path, num_envs=2).run(120, Watcher())
    continued = begin(tmp_path, settings=[])
    assert continued.facts.num_envs == 2 and continued.config.train.batch_size == 8


def test_settings_that_change_nothing_learned_may_change(tmp_path: Path) -> None:
    begin(tmp_path).run(120, Watcher())
    assert begin(tmp_path, settings=[*SMALL, "train.eval_every=7", "train.checkpoint_seconds=9"]).config.train.eval_every == 7


def test_a_training_that_moves_to_another_dtype_says_so(tmp_path: Path) -> None:
    begin(tmp_path).run(120, Watcher())
    store = Store(tmp_path, "pointmass")
    moved = begin_training(store, choose_runtime("cpu", "bf16"), steps=STEPS, seed=0)
    assert "ran on cpu, fp32 before and goes on on cpu, bf16" in moved.notes[0]
    assert not begin(tmp_path).notes


def test_two_trainings_of_one_store_keep_out_of_each_others_way(tmp_path: Path) -> None:
    def second(progress: Progress) -> None:
        if progress.decisions == 130:
            with pytest.raises(ConfigError, match="another 'specmpc train' is at work"):
                begin(tmp_path).run(STEPS, Watcher())
            raise Killed

    with pytest.raises(Killed):
        begin(tmp_path).run(STEPS, Watcher(second))
    begin(tmp_path).run(160, Watcher())


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


def test_damaged_checkpoints_are_named(tmp_path: Path) -> None:
    begin(tmp_path).run(120, Watcher())
    state = Store(tmp_path, "pointmass").resume_folder() / "state.safetensors"
    whole = state.read_bytes()
    for damaged in (whole[:100], b"", whole[: len(whole) // 2]):
        state.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="is damaged"):
            begin(tmp_path)
    state.write_bytes(whole)
    shard = next((state.parent / "replay").glob("*.h5"))
    shard.write_bytes(shard.read_bytes()[:200])
    with pytest.raises(DatasetError, match=shard.name):
        begin(tmp_path)


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
