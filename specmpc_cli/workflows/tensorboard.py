"""Training metrics for TensorBoard, which is an extra."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specmpc_cli.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardLog:
    """Writes each line of metrics.jsonl as scalars over decisions."""

    def __init__(self, folder: Path, decisions: int) -> None:
        """`decisions`: where the training goes on; what a killed run wrote beyond is hidden. Raises ConfigError without TensorBoard."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError("--tensorboard needs TensorBoard, which is not installed; run: pip install 'specmpc[tensorboard]'") from None
        self._folder, self._open = folder, partial(SummaryWriter, str(folder), purge_step=decisions + 1)
        self._writer: SummaryWriter | None = None  # it writes at once, so it waits until no other training can be at work

    def add(self, line: dict[str, Any]) -> None:
        """One line of metrics. Raises StoreError."""
        try:
            if self._writer is None:
                self._writer = self._open()
            for name, value in line.items():
                if isinstance(value, int | float) and name not in ("decisions", "episode"):
                    self._writer.add_scalar(f"{line['event']}/{name}", float(value), line["decisions"])
            self._writer.flush()
        except OSError as error:
            raise StoreError(f"cannot write TensorBoard files to {self._folder}: {error.strerror or error}") from None
