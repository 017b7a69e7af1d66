"""Options that commands share, and the decorator that gives each command the common ones. Loads no torch."""

import functools
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from specmpc_cli.cli.console import only_documents


def _shared(*names: str, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel="Options of every command", **settings)


_StoreOption = Annotated[Path, _shared(help="Folder of teachers, correctors, data and results.", envvar="SPECMPC_STORE")]
_NameOption = Annotated[str, _shared(help="Keeps several teachers of one task apart.")]
_DeviceOption = Annotated[str, _shared(help="auto, cpu, cuda or cuda:N.")]
_DtypeOption = Annotated[str, _shared(help="Precision of matrix products: auto, bf16, fp32 or int8.")]
_SeedOption = Annotated[int, _shared(min=0, max=49_999, help="Picks the episodes and all random draws.")]
_JsonOption = Annotated[bool, _shared("--json", help="One JSON document on standard output.")]
_QuietOption = Annotated[bool, _shared("--quiet", help="No notes, no progress.")]


@dataclass(frozen=True, slots=True)
class Common:
    """The options that every command takes."""

    store: _StoreOption = Path("specmpc-store")
    name: _NameOption = "main"
    device: _DeviceOption = "auto"
    dtype: _DtypeOption = "auto"
    seed: _SeedOption = 0
    json: _JsonOption = False
    quiet: _QuietOption = False


def repeated(common: Common, *names: str) -> list[str]:
    """These common options as they would stand on a command line; those at their defaults left out."""
    default = Common()
    given = [name for name in names if getattr(common, name) != getattr(default, name)]
    return [part for name in given for part in (f"--{name}", str(getattr(common, name)))]


def common_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command whose first parameter is `common: Common` the common options on the command line."""
    own = list(inspect.signature(command).parameters.values())[1:]
    shared = [inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type) for f in fields(Common)]
    names = [parameter.name for parameter in shared]

    @functools.wraps(command)
    def wrapper(**values: Any) -> Any:
        common = Common(**{name: values.pop(name) for name in names})
        with only_documents() if common.json else nullcontext():
            return command(common, **values)

    keyword_only = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    wrapper.__signature__ = inspect.Signature([*keyword_only, *shared])  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *shared]}
    return wrapper


def is_given(context: typer.Context, option: str) -> bool:
    """Whether an option stands on the command line, or its environment variable is set."""
    source = context.get_parameter_source(option)
    return source is not None and source.name != "DEFAULT"


TaskOption = Annotated[str | None, typer.Option("--task", help="Task name; the one used last in this store if left out.")]
ArchOption = Annotated[str | None, typer.Option("--arch", help="two-tower, temporal or distilled.")]
PresetOption = Annotated[list[str] | None, typer.Option("--preset", help="Preset name or YAML file; repeatable, merged in order.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="One setting, such as planner.iterations=4; repeatable.")]
EpisodesOption = Annotated[int, typer.Option("--episodes", min=1, max=10_000, help="Episodes per way of acting.")]
AcceptBelowOption = Annotated[float | None, typer.Option(help="Accept the planned action up to this mismatch.")]
RequireOption = Annotated[
    str | None,
    typer.Option("--require", help='Such as "calls_saved>=0.5,return_vs_baseline>=0.95"; exit 3 if no row meets all.'),
]
VideoOption = Annotated[Path | None, typer.Option("--video", help="Also film one episode: a .mp4 or .gif file.")]
ReplanAboveOption = Annotated[float | None, typer.Option(help="Plan again above this mismatch.")]
