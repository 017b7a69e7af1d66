"""Which gates the calibrate episodes have judged: episodes that have chosen among gates cannot vouch for another one.

One line of JSON per gate, in a file beside the correctors; what another store or name has asked of the same episodes it does not know.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from specmpc_cli.engine.checkpoint import weights_sha256
from specmpc_cli.engine.gate import GateRule
from specmpc_cli.errors import StoreError
from specmpc_cli.files import make_folder
from specmpc_cli.workflows.store import FittedCorrector

_FIELDS = ("seed", "episodes", "arch", "teacher", "corrector", "gate", "acting")


class JudgedGates:
    """The gates that the calibrate episodes of one seed have judged, for one way of planning."""

    def __init__(self, path: Path, seed: int, episodes: int, acting: dict[str, Any]) -> None:
        """
        Args:
            path: the file, which need not exist.
            episodes: how many judge; to ask again with some more of them is to ask another time.
            acting: settings and precision that plans are made with; with others, the same gate is another one.
        """
        self._path, self._seed, self._episodes, self._acting = path, seed, episodes, acting

    def room(self, corrector: FittedCorrector, at_most: int) -> bool:
        """Whether a gate of this corrector may be judged: fewer than `at_most` of its architecture have been, or its own is among them."""
        judged = self._judged(corrector)
        return len(judged) < at_most or any(line["corrector"] == _identity(corrector) for line in judged)

    def admits(self, corrector: FittedCorrector, rule: GateRule, at_most: int) -> bool:
        """The same for one gate. One that has been judged will only be told the same again."""
        judged = self._judged(corrector)
        return len(judged) < at_most or self._line(corrector, rule) in judged

    def add(self, corrector: FittedCorrector, rule: GateRule) -> None:
        """Remembers that this gate has been judged. Raises StoreError."""
        line = self._line(corrector, rule)
        if line in self._lines():
            return
        make_folder(self._path.parent)
        try:
            with open(self._path, "a") as file:  # one short write at the end: what others add meanwhile stays
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise StoreError(f"cannot write {self._path}: {error.strerror}; choose another --store") from None

    def _line(self, corrector: FittedCorrector, rule: GateRule) -> dict[str, Any]:
        return {
            "seed": self._seed,
            "episodes": self._episodes,
            "arch": corrector.arch,
            "teacher": corrector.facts.teacher_sha256,
            "corrector": _identity(corrector),
            "gate": rule.as_json(),
            "acting": self._acting,
        }

    def _judged(self, corrector: FittedCorrector) -> list[dict[str, Any]]:
        """Those of the same seed, architecture and teacher."""
        mine = {"seed": self._seed, "arch": corrector.arch, "teacher": corrector.facts.teacher_sha256}
        return [line for line in self._lines() if {name: line[name] for name in mine} == mine]

    def _lines(self) -> list[dict[str, Any]]:
        try:
            lines = [json.loads(line) for line in self._path.read_text().splitlines()]
            return [{name: line[name] for name in _FIELDS} for line in lines]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError):
            raise StoreError(f"cannot read {self._path}, which tells fresh calibrate episodes from spent ones; delete it") from None


def _identity(corrector: FittedCorrector) -> str:
    return weights_sha256(corrector.network.state_dict())
