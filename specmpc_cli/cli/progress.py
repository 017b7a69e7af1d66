"""What `train` shows while it runs and when it is done. Loads no torch when imported."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from specmpc_cli.cli.console import Output

if TYPE_CHECKING:
    from specmpc_cli.workflows.tensorboard import TensorBoardLog
    from specmpc_cli.workflows.train_log import Progress, Watcher
    from specmpc_cli.workflows.training import Trainer

_LINE_SECONDS = 60.0  # between lines where there is no terminal to redraw
_RATE_SECONDS = 30.0  # the stretch over which decisions per second are taken
_SHOWN_LOSSES = {"consistency_loss": "consistency", "reward_loss": "reward", "value_loss": "value", "pi_loss": "policy"}


class TrainingDisplay:
    """A progress bar on a terminal, a line a minute elsewhere, and a line for each evaluation."""

    def __init__(self, out: Output, trainer: "Trainer", steps: int) -> None:
        self._out, self._trainer, self._steps = out, trainer, steps
        self._said = time.monotonic()
        self._marks = [(self._said, trainer.counters.decisions)]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Shows progress inside."""
        with self._out.progress() as bars:
            self._bars = bars
            self._bar = bars.add_task("starting", total=self._steps, completed=self._trainer.counters.decisions, state="")
            yield

    def watcher(self, log: "TensorBoardLog | None") -> "Watcher":
        """What the trainer calls; metrics also go to TensorBoard, if it is asked for."""
        from specmpc_cli.workflows.train_log import Watcher

        def metrics(line: dict[str, Any]) -> None:
            self.metrics(line)
            if log is not None:
                log.add(line)

        return Watcher(self.show, metrics)

    def show(self, progress: "Progress") -> None:
        """After each decision, and after each update of the first ones."""
        self._mark(progress.decisions)
        states = {"first updates": f"{progress.updates} updates", "evaluating": "with the full planner"}
        state = states.get(progress.phase) or self._state(progress)
        self._bars.update(self._bar, description=progress.phase, completed=progress.decisions, state=state)
        if not self._out.interactive and time.monotonic() - self._said > _LINE_SECONDS:
            self._said = time.monotonic()
            left = self._bars.tasks[0].time_remaining
            ends = f" · {_duration(left)} left" if left is not None and progress.phase == "training" else ""
            self._out.note(f"{progress.phase}: {progress.decisions} of {self._steps} decisions · {state}{ends}")

    def metrics(self, line: dict[str, Any]) -> None:
        """Each line of metrics.jsonl."""
        if line["event"] == "eval":
            returns = ", ".join(f"{value:.0f}" for value in line["returns"])
            success = f", success {line['success_rate']:.0%}" if "success_rate" in line else ""
            self._out.note(f"after {line['decisions']} decisions: evaluation return {line['return_mean']:.1f} ({returns}){success}")

    def _mark(self, decisions: int) -> None:
        now = time.monotonic()
        self._marks.append((now, decisions))
        while self._marks[0][0] < now - _RATE_SECONDS:
            self._marks.pop(0)

    def _state(self, progress: "Progress") -> str:
        (since, before), (now, decisions) = self._marks[0], self._marks[-1]
        parts = [f"{(decisions - before) / max(now - since, 1e-3):.1f} decisions/s"]
        if progress.last_return is not None:
            parts.append(f"return {progress.last_return:.1f}")
        parts += [f"{short} {progress.losses[name]:.3g}" for name, short in _SHOWN_LOSSES.items() if name in progress.losses]
        return " · ".join(parts)


def show_report(out: Output, report: dict[str, Any]) -> None:
    """What a training that ended leaves to say."""
    out.say(f"trained: {report['decisions']} decisions, {report['updates']} updates, {report['seconds'] / 60:.0f} min")
    evaluated = report["evaluated_decisions"]
    which = "last evaluation" if evaluated == report["decisions"] else f"evaluation after {evaluated} decisions"
    if evaluated == report["teacher_decisions"] != report["decisions"]:
        which += ", whose weights are kept"
    if report["returns"]:
        out.say(f"{which}: return {report['return_mean']:.1f} over {len(report['returns'])} episodes")
    out.say(f"teacher: {report['path']}")
    out.say(f"curve:   {report['curve']}")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
