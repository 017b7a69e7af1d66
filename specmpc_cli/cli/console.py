"""The two streams: tables and JSON on standard output; notes, errors and progress on standard error."""

import ctypes
import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from typing import Any, TextIO

from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

PLAIN_WIDTH = 140  # columns where there is no terminal


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, width=None if stream.isatty() else PLAIN_WIDTH)


_for_documents: ContextVar[TextIO | None] = ContextVar("for_documents", default=None)  # standard output, while it is kept from others


@contextmanager
def only_documents() -> Iterator[None]:
    """Within it JSON documents go to standard output, and what others print, simulators and users' environments, to standard error."""
    with _standard_output_kept() as documents:
        token = _for_documents.set(documents)
        try:
            with redirect_stdout(sys.stderr):
                yield
        finally:
            _for_documents.reset(token)


@contextmanager
def _standard_output_kept() -> Iterator[TextIO]:
    """Standard output, while libraries that write to its descriptor, C code and child processes, meet standard error there."""
    stdout = sys.stdout
    try:
        out, err = stdout.fileno(), sys.stderr.fileno()
    except (AttributeError, io.UnsupportedOperation):  # streams of Python's own: there is no descriptor to lead elsewhere
        yield stdout
        return
    stdout.flush()
    with os.fdopen(os.dup(out), "w", encoding=stdout.encoding) as documents:
        os.dup2(err, out)
        try:
            yield documents
        finally:
            # What Python's own stream and C's have kept back belongs to standard error, too.
            stdout.flush()
            ctypes.CDLL(None).fflush(None)
            os.dup2(documents.fileno(), out)


def print_error(message: str) -> None:
    """One red line on standard error."""
    _console(stderr=True).print(f"error: {' '.join(message.split())}", style="bold red", markup=False, soft_wrap=True)


class Output:
    """Where a command's words go, as `--json` and `--quiet` ask."""

    def __init__(self, *, as_json: bool, quiet: bool) -> None:
        self.as_json, self.quiet = as_json, quiet
        self._out, self._err = _console(stderr=False), _console(stderr=True)

    @property
    def interactive(self) -> bool:
        """Whether progress bars can be redrawn."""
        return self._err.is_terminal

    def note(self, message: str) -> None:
        """A line for the person watching."""
        if not self.quiet:
            self._err.print(message, style="dim", markup=False, soft_wrap=True)

    def say(self, message: str) -> None:
        """A line of the result; left out with `--json`."""
        if not self.as_json:
            self._out.print(message, markup=False, soft_wrap=True)

    def table(self, table: Table) -> None:
        """A table of the result, as wide as it needs to be; left out with `--json`."""
        if self.as_json:
            return
        needed = Measurement.get(self._out, self._out.options.update(width=10_000), table).maximum
        self._out.width = max(self._out.width, needed)
        self._out.print(table)

    def document(self, document: Any) -> None:
        """The JSON document, with `--json`."""
        if self.as_json:
            (_for_documents.get() or sys.stdout).write(json.dumps(document, indent=1) + "\n")

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """Progress bars on standard error."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[state]}"),
        )
        with Progress(*columns, console=self._err, disable=self.quiet) as progress:
            yield progress
