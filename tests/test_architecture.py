"""The layer rule of docs/architecture.md, and that the command line starts without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "specmpc_cli"

# A file imports from lower layers or its own folder; beyond that, envs and data never import engine (same layer).
LAYERS = {
    "__init__": 0, "errors": 0, "types": 0, "runtime": 0, "files": 0, "versions": 0,
    "config": 1, "engine": 2, "envs": 2, "data": 2, "learning": 3, "workflows": 4, "api": 5, "cli": 5, "__main__": 5,
}  # fmt: skip


def imports_of(path: Path) -> set[str]:
    """Top-level parts of specmpc_cli that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            parts = name.split(".")
            if parts[0] == "specmpc_cli":
                found.add(parts[1] if len(parts) > 1 else "__init__")
    return found


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_from_lower_layers_or_its_own_folder(path: Path) -> None:
    own = part_of(path)
    for imported in imports_of(path) - {own}:
        lower = LAYERS[imported] < LAYERS[own]
        same_layer_of_files = LAYERS[imported] == LAYERS[own] == 0
        command_line = own == "__main__" and imported == "cli"
        assert lower or same_layer_of_files or command_line, f"{path.relative_to(PACKAGE)} imports {imported}"


def test_the_command_line_loads_no_torch() -> None:
    heavy = "{'torch', 'mujoco', 'dm_control', 'metaworld', 'gymnasium', 'h5py', 'matplotlib'}"
    code = f"import sys, specmpc_cli.cli.app; loaded = {heavy} & set(sys.modules); assert not loaded, loaded"
    subprocess.run([sys.executable, "-c", code], check=True)
