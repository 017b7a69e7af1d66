"""The `specmpc` command. Importing this module loads no torch: each command imports its workflow when it runs."""

from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from specmpc_cli import __version__
from specmpc_cli.cli import acting, distilling, teachers
from specmpc_cli.cli.console import print_error
from specmpc_cli.errors import GateFailed, Interrupted, SpecMPCError

_UsageError: type[Exception] = typer.BadParameter.__bases__[0]  # Typer exports no other name for it


class _Group(TyperGroup):
    """Turns errors that a user can mend into one red line and an exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except _UsageError as error:
            if not given:  # which is answered with the help
                raise
            message = error.format_message().rstrip(".")  # type: ignore[attr-defined]
            hint = "; options follow the command" if message.startswith("No such option") else ""
            print_error(f"{message}{hint} (see 'specmpc --help')")
            raise typer.Exit(2) from None

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except GateFailed as error:
            print_error(str(error))
            raise typer.Exit(3) from None
        except _UsageError as error:
            print_error(f"{error.format_message()} (see 'specmpc {ctx.invoked_subcommand or ''} --help')")  # type: ignore[attr-defined]
            raise typer.Exit(2) from None
        except Interrupted as error:
            print_error(str(error))
            raise typer.Exit(130) from None
        except SpecMPCError as error:
            print_error(str(error))
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            print_error("interrupted; files written so far are whole, and the same command continues or starts over")
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"specmpc {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Version.")] = False,
) -> None:
    """World-model control at a fraction of the planning cost: TD-MPC2 with speculative planning."""


# In the order of a project: what there is, a teacher, its correctors, what they save.
COMMANDS: dict[str, Callable[..., None]] = {
    "tasks": teachers.tasks,
    "train": teachers.train,
    "import": teachers.import_,
    "export": teachers.export,
    "collect": distilling.collect,
    "fit-corrector": distilling.fit_corrector,
    "eval": acting.eval_,
    "compare": acting.compare,
    "bench": acting.bench,
}
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)

main: Callable[[], None] = app
