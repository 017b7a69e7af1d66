"""Presets: small YAML files that hold only differences, merged left to right, then single settings; and where the shipped ones are."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from specmpc_cli.config.schema import Config
from specmpc_cli.errors import ConfigError


def presets_root() -> Path:
    """The shipped presets: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return next((root for root in (package / "presets", package.parent / "presets") if root.is_dir()), package / "presets")


def zoo_root() -> Path:
    """The embedded teachers and correctors, in the store's own layout less the store's name."""
    return presets_root() / "zoo"


def preset_names() -> list[str]:
    return sorted(path.stem for path in presets_root().glob("*.yaml"))


def load_config(presets: Sequence[str] = (), settings: Sequence[str] = (), base: Mapping[str, Any] | None = None) -> Config:
    """Defaults ← base ← presets, left to right ← settings `a.b=c`. Raises ConfigError naming the offending preset, key or value."""
    merged: dict[str, Any] = dict(base or {})
    for preset in presets:
        merged = merge(merged, read_preset(preset))
    for setting in settings:
        merged = merge(merged, _parse_setting(setting))
    return validate(merged, "settings")


def check_sections(settings: Sequence[str], sections: Sequence[str], command: str) -> None:
    """Raises ConfigError for a setting `a.b=c` of a section that exists and that the command does not read.

    Presets may hold sections of other commands.
    """
    for setting in settings:
        key = setting.partition("=")[0]
        section = key.partition(".")[0]
        if section in Config.model_fields and section not in sections:
            raise ConfigError(f"--set {key} has no part in {command}, which takes {', '.join(f'{name}.*' for name in sections)}")


def validate(values: Mapping[str, Any], where: str) -> Config:
    """The validated config. Raises ConfigError with the first thing that is wrong."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise ConfigError(f"{where}: there is no setting {key}{_suggest_key(first['loc'])}") from None
        came = "" if isinstance(first["input"], dict) else f", got {first['input']!r}"
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{where}: {key + ': ' if key else ''}{message}{came}") from None


def read_preset(name: str) -> dict[str, Any]:
    """A preset by its shipped name or its path."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = presets_root() / f"{name}.yaml"
        if not path.is_file():
            close = difflib.get_close_matches(name, preset_names(), n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(preset_names())}, or give a .yaml file"
            raise ConfigError(f"unknown preset {name!r}{hint}")
    return read_yaml(path)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping. Raises ConfigError if the file is missing, unreadable or something else."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: bytes that are no text, a date that is none
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} is not YAML: {reason}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}; expected a mapping such as 'planner: {{iterations: 4}}'")
    return content


def merge(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings, the new values winning."""
    out = dict(old)
    for key, value in new.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = merge(out[key], value) if both else value
    return out


def _parse_setting(setting: str) -> dict[str, Any]:
    key, equals, text = setting.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set takes a.b=value, got {setting!r}")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        raise ConfigError(f"--set {key}: {text!r} is not a YAML value") from None
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _suggest_key(location: tuple[int | str, ...]) -> str:
    section: Any = Config
    for part in location[:-1]:
        section = section.model_fields[part].annotation
    close = difflib.get_close_matches(str(location[-1]), list(section.model_fields), n=1)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(section.model_fields)}"
