"""`train.keep=best` on pointmass: the weights of the best evaluation, whenever the training is killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from specmpc_cli.workflows.store import Store
from specmpc_cli.workflows.train import training_report
from specmpc_cli.workflows.train_log import TrainingLog, Watcher
from specmpc_cli.workflows.train_state import Counters
from tests.workflows.pointmass_training import SMALL, STEPS, Killed, begin, kill_at, same_weights, teacher

pytestmark = pytest.mark.usefixtures("tiny_models")


def scores(monkeypatch: pytest.MonkeyPatch, returns: dict[int, float]) -> None:
    """Makes the evaluation after so many decisions find that return."""
    evaluation = TrainingLog.evaluation

    def fixed(log: TrainingLog, counters: Counters, stats: Any) -> dict[str, Any]:
        line = evaluation(log, counters, stats)
        line["return_mean"] = returns[counters.decisions]
        return line

    monkeypatch.setattr(TrainingLog, "evaluation", fixed)


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
