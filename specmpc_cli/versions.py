"""What produced a file: package versions and the commit, for datasets and results. Imports none of the packages."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from specmpc_cli import __version__

_PACKAGES = ("torch", "numpy", "gymnasium", "mujoco", "dm-control", "metaworld", "h5py")


@cache
def versions() -> dict[str, str]:
    """Versions of ourselves, Python and the packages that numbers depend on; those not installed are left out."""
    found = {"specmpc": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@cache
def commit() -> str | None:
    """The checkout's commit, with `+` where it has changes; None outside a checkout of this project."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            cwd=root, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()
