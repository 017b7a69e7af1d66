"""The command line in process, on the built-in pointmass task with a planner small enough for seconds."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from specmpc_cli.cli.app import app

SMALL = "planner: {iterations: 2, num_samples: 32, num_elites: 8, num_pi_trajs: 4}\ncorrector: {width: 16, history: 4, epochs: 3}\n"


def heed_ctrl_c() -> None:
    """In a child before it starts: a shell's background jobs ignore Ctrl-C, and so would everything that they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        return json.loads(self.out)


@dataclass(frozen=True)
class Command:
    """Runs `specmpc` with a store of its own."""

    store: Path
    preset: Path

    def __call__(self, name: str, *arguments: str, small: bool = True) -> Result:
        options = ["--store", str(self.store)]
        if small and name in ("collect", "fit-corrector", "eval", "compare"):
            options += ["--preset", str(self.preset)]
        result = CliRunner().invoke(app, [name, *arguments, *options])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Result(result.exit_code, result.stdout, result.stderr)

    def fails(self, name: str, *arguments: str, code: int = 2) -> str:
        """The one line that a refused command leaves on standard error."""
        result = self(name, *arguments, "--quiet")
        assert result.code == code, (result.code, result.err)
        assert result.out == "" and "Traceback" not in result.err
        lines = result.err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), result.err
        return lines[0]


@pytest.fixture(scope="session")
def make_command(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Command]:
    def make(name: str) -> Command:
        root = tmp_path_factory.mktemp(name)
        (root / "small.yaml").write_text(SMALL)
        return Command(root / "store", root / "small.yaml")

    return make


@pytest.fixture
def command(make_command: Callable[[str], Command]) -> Command:
    """An empty store."""
    return make_command("empty")


@pytest.fixture
def with_teacher(command: Command, checkpoint: Path) -> Command:
    """A store with a pointmass teacher."""
    assert command("import", str(checkpoint), "--task", "pointmass").code == 0
    return command


@pytest.fixture(scope="session")
def pipeline(make_command: Callable[[str], Command], checkpoint: Path) -> Command:
    """A store that went through import, two rounds of collect, and fit-corrector. Tests must not change it."""
    command = make_command("pipeline")
    for arguments in (
        ("import", str(checkpoint), "--task", "pointmass"),
        ("collect", "--episodes", "4", "--rounds", "2"),
        ("fit-corrector",),
        ("fit-corrector", "--arch", "distilled"),
    ):
        result = command(*arguments)
        assert result.code == 0, result.err
    return command
