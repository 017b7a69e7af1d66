"""Files that are whole or absent: written beside, flushed, renamed. Knows nothing of what is in them."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from specmpc_cli.errors import ConfigError, StoreError


def write_whole(path: Path, content: bytes | str) -> None:
    """Replaces `path` with `content` in one step. Raises StoreError if the folder cannot be written."""
    data = content.encode() if isinstance(content, str) else content
    with replacing(path) as beside:
        beside.write_bytes(data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to; on success it takes `path`'s place, on failure it is removed and `path` is untouched."""
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        make_folder(path.parent)
        yield beside
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror or error}; free space there, or choose another place") from None
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def stamp(path: Path) -> tuple[int, int] | None:
    """Tells one content of a file from the next; None where there is no file that can be seen."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def why_unreadable(error: Exception) -> str | None:
    """The system's reason why a file could not be read; None where it was read and makes no sense: only then it is damaged."""
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno is not None else None


def make_folder(folder: Path) -> None:
    """Creates a folder and its parents. Raises StoreError where that is not allowed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"cannot create {folder}: {error.strerror or error}; choose another --store") from None


def check_destination(path: Path, option: str) -> None:
    """Raises ConfigError where no file can be written to the path that an option named, before the work that would fill it."""
    try:
        if path.is_dir():
            raise ConfigError(f"{option} must be a file, and {path} is a folder")
        if path.exists() and not path.is_file():
            raise ConfigError(f"{option} must be a regular file, and {path} is none")
        if not path.parent.is_dir():
            raise ConfigError(f"cannot write {path}: there is no folder {path.parent}; create it, or choose another {option}")
    except OSError as error:  # a name too long, a folder that may not be searched
        raise ConfigError(f"cannot write {path}: {error.strerror or error}; choose another {option}") from None
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"no permission to write to {path.parent}; choose another {option}")
