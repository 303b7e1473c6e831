"""Results to stdout, progress and logs to stderr, rank 0 speaks."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from hpcai_cli import launch
from hpcai_cli.errors import HpcaiError

PLAIN_SECONDS = 10.0
"""Time between two progress lines where there is no terminal."""


def result(text: str, *, end: str = "\n") -> bool:
    """Print a result for people on stdout; only rank 0 does. Return False when the reader has just gone away."""
    if launch.place().rank == 0:
        try:
            print(text, end=end, flush=True)
        except BrokenPipeError:
            # `hpcai ... | head`: the reader has what it wanted. The work goes on, so that the exit code stays true.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return False
    return True


def result_json(document: Mapping) -> None:
    """Print one JSON document, on one line, on stdout; only rank 0 does. NaN and infinity become null."""
    result(json.dumps(_finite(document), default=str, allow_nan=False))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table for people on stdout; only rank 0 does."""
    if launch.place().rank != 0:
        return
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    drawn = Table(box=SIMPLE)
    for number, column in enumerate(columns):
        drawn.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        drawn.add_row(*(format_value(cell) for cell in row))
    # mpirun gives its ranks a terminal, whose signs would end up in whatever reads what they print.
    is_terminal = sys.stdout.isatty() and not launch.place().launcher
    # A pipe or a batch log has no width of its own; 80 columns would fold what a script's reader wants whole.
    console = Console(width=None if is_terminal else 120, force_terminal=is_terminal, highlight=False, markup=False)
    with console.capture() as text:
        console.print(title, style="bold", soft_wrap=True)
        console.print(drawn)
    result(text.get().rstrip())


def note(text: str) -> None:
    """Tell people on stderr what goes on; only rank 0 does."""
    if launch.place().rank == 0:
        print(text, file=sys.stderr, flush=True)


def fail(text: str, *, collective: bool = False) -> None:
    """Report a failure on stderr: this rank's own with its number, one of all ranks by rank 0 alone."""
    here = launch.place()
    if collective or here.size == 1:
        note(f"error: {text}")
    else:
        print(f"[rank {here.rank}] error: {text}", file=sys.stderr, flush=True)


def format_value(value: object) -> str:
    """Format one cell of a table: large counts with commas, floats to four places."""
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if abs(value) >= 1000:
            return f"{value:,.1f}"
        return f"{value:.4f}" if abs(value) >= 1e-4 or value == 0 else f"{value:.3g}"
    return str(value)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what native libraries print on stderr away while they load; show it when loading fails or with --verbose.

    TensorFlow logs before its own log level counts, straight to the file descriptor.
    """
    if os.environ.get(launch.VERBOSE_VARIABLE):
        yield
        return
    sys.stderr.flush()
    with tempfile.TemporaryFile() as kept:
        saved = os.dup(2)
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except HpcaiError:
            raise  # It says all that people need.
        except BaseException:
            kept.seek(0)
            os.write(saved, kept.read())
            raise
        finally:
            os.dup2(saved, 2)
            os.close(saved)


class Progress:
    """A bar on a terminal, plain lines elsewhere, silence on every rank but 0.

    Args:
        total: how many units there are, None when unknown.
        unit: `images`, `bytes` or the like, for the rate.
        done: units that were done before, as when a job is resumed.
    """

    def __init__(self, description: str, total: int | None, unit: str, done: int = 0):
        self._description, self._total, self._unit = description, total, unit
        self._started = self._last_line = self._last_draw = time.monotonic()
        self._done_before = self._completed = done
        self._bar = self._task = self._stream = None
        self._silent = launch.place().rank != 0
        if not self._silent:
            self._stream = _terminal()
            if self._stream is not None:
                self._bar, self._task = _bar(self._stream, description, total, done)

    def update(self, completed: int, text: Callable[[], str] = str) -> None:
        """Set how many units are done; `text` gives a short text such as the loss so far, when one is drawn."""
        self._completed = completed
        if self._silent:
            return
        now = time.monotonic()
        if self._bar is not None:
            # Ten pictures a second are enough for the eye and keep the drawing out of the training step's time.
            if now - self._last_draw >= 0.1 or completed == self._total:
                self._last_draw = now
                self._bar.update(self._task, completed=completed, text=f"{text()}  {self._rate()}", refresh=True)
        elif now - self._last_line >= PLAIN_SECONDS:
            self._last_line = now
            share = f" {100 * completed / self._total:.0f} %" if self._total else ""
            print(f"{self._description}{share} {text()} {self._rate()}", file=sys.stderr, flush=True)

    def line(self, text: str) -> None:
        """Print a line that stays, above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif not self._silent:
            note(text)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
        if self._stream is not None and self._stream is not sys.stderr:
            self._stream.close()

    def _rate(self) -> str:
        rate = (self._completed - self._done_before) / max(time.monotonic() - self._started, 1e-9)
        if self._unit == "bytes":
            return f"{rate / 1e6:.1f} MB/s"
        return f"{rate:,.0f} {self._unit}/s"


@contextmanager
def progress(description: str, *, total: int | None, unit: str, done: int = 0) -> Iterator[Progress]:
    """Show progress until the block ends, however it ends."""
    shown = Progress(description, total, unit, done)
    try:
        yield shown
    finally:
        shown.close()


def _terminal():
    """Return the stream of a terminal to draw on, None where there is none."""
    if sys.stderr.isatty():
        return sys.stderr
    path = os.environ.get(launch.TERMINAL_VARIABLE)
    if path:
        try:
            return open(path, "w")
        except OSError:
            return None
    return None


def _bar(stream, description: str, total: int | None, done: int):
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    bar = RichProgress(TextColumn("{task.description}"), BarColumn(bar_width=24), TaskProgressColumn(),
                       TextColumn("{task.fields[text]}"), TimeRemainingColumn(),
                       console=Console(file=stream, force_terminal=True), auto_refresh=False, transient=True)
    task = bar.add_task(description, total=total, completed=done, text="")
    bar.start()
    return bar, task


def _finite(value):
    """Replace what JSON cannot say (NaN, infinity, numpy scalars, paths) by what it can."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if hasattr(value, "tolist"):
        return _finite(value.tolist())
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
