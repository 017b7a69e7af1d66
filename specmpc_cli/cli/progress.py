"""What `train` shows while it runs and when it is done. Loads no torch when imported."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from specmpc_cli.cli.console import Output

if TYPE_CHECKING:
    from specmpc_cli.workflows.training import Progress, Trainer

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
        """Shows progress inside; says where the training stands if it is interrupted."""
        with self._out.progress() as bars:
            self._bars = bars
            self._bar = bars.add_task("starting", total=self._steps, completed=self._trainer.counters.decisions, state="")
            try:
                yield
            except KeyboardInterrupt:
                kept = self._trainer.checkpointed
                what = f"the training up to decision {kept} is kept; --resume continues there" if kept else "no checkpoint yet"
                self._out.note(f"interrupted after {self._trainer.counters.decisions} decisions: {what}")
                raise

    def show(self, progress: "Progress") -> None:
        """After each decision, and after each update of the first ones."""
        self._mark(progress.decisions)
        state = f"{progress.updates} updates" if progress.phase == "first updates" else self._state(progress)
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
            self._out.note(f"after {line['decisions']} decisions: evaluation return {line['return_mean']:.1f} ({returns})")

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


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
