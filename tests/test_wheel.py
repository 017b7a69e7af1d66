"""A built wheel, installed elsewhere, finds its presets and its zoo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel was installed, without its dependencies, which this environment has."""
    folder = tmp_path_factory.mktemp("wheel")
    quiet = {"check": True, "stdout": subprocess.DEVNULL}
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)], **quiet)
    (wheel,) = folder.glob("*.whl")
    assert wheel.stat().st_size < 60e6
    target = folder / "site"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)], **quiet)
    return target


def run(installed: Path, *arguments: str) -> str:
    """A command of the installed package, started far from the checkout."""
    env = os.environ | {"PYTHONPATH": str(installed), "SPECMPC_COMPILE": "0"}
    done = subprocess.run([sys.executable, *arguments], cwd=installed, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_that_runs_is_the_installed_one_and_finds_its_presets(installed: Path) -> None:
    code = "import specmpc_cli.config.presets as p; print(p.__file__); print(p.presets_root()); print(p.preset_names())"
    file, root, names = run(installed, "-c", code).splitlines()
    assert Path(file).is_relative_to(installed) and Path(root) == installed / "specmpc_cli" / "presets"
    assert "light-planner" in names


def test_the_embedded_teacher_and_correctors_act(installed: Path) -> None:
    report = run(
        installed, "-m", "specmpc_cli", "eval", "--mode", "policy", "--episodes", "1", "--task", "walker-walk", "--json", "--quiet"
    )
    assert json.loads(report)["teacher"]["source"] == "embedded"
    code = (
        "from pathlib import Path; from specmpc_cli.workflows.store import Store;"
        "s = Store(Path('none'), 'walker-walk'); found, notes = s.correctors(s.teacher());"
        "print([(c.arch, c.source) for c in found], notes)"
    )
    assert run(installed, "-c", code).strip() == "[('two-tower', 'embedded'), ('temporal', 'embedded')] []"


def test_the_kernels_sources_are_installed(installed: Path) -> None:
    sources = {path.name for path in (installed / "specmpc_cli" / "engine" / "native").iterdir()}
    assert {"ops.cpp", "fused_mlp.h", "learnt_mlp.h", "products.h", "rows.h"} <= sources


def test_the_command_is_installed(installed: Path) -> None:
    assert (installed / "bin" / "specmpc").exists()
