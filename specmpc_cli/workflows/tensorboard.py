"""Training metrics for TensorBoard, which is an extra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specmpc_cli.errors import ConfigError


class TensorBoardLog:
    """Writes each line of metrics.jsonl as scalars over decisions."""

    def __init__(self, folder: Path, decisions: int) -> None:
        """`decisions`: where the training goes on; what a killed run wrote beyond is hidden. Raises ConfigError without TensorBoard."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError("--tensorboard needs TensorBoard, which is not installed; run: pip install 'specmpc[tensorboard]'") from None
        self._writer = SummaryWriter(str(folder), purge_step=decisions + 1)

    def add(self, line: dict[str, Any]) -> None:
        """One line of metrics."""
        for name, value in line.items():
            if isinstance(value, int | float) and name not in ("decisions", "episode"):
                self._writer.add_scalar(f"{line['event']}/{name}", float(value), line["decisions"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
