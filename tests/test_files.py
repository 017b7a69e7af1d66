"""Files that are whole or absent, and places that cannot take one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from specmpc_cli.errors import ConfigError
from specmpc_cli.files import check_destination


def test_places_that_take_no_file_are_refused_with_the_reason(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, reason in (
        (tmp_path, "is a folder"),
        (tmp_path / "pipe", "must be a regular file"),
        (Path(os.devnull), "must be a regular file"),
        (tmp_path / "gone" / "file", "there is no folder"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        with pytest.raises(ConfigError, match=reason):
            check_destination(path, "--out")
    check_destination(tmp_path / "file", "--out")
