"""The Typer app: the commands in workflow order, and errors turned into exit codes."""

import os
import sys
import traceback
from typing import Annotated

import typer
from typer.core import TyperGroup

from hpcai_cli import __version__, console, fast_loading
from hpcai_cli.commands.benchmark import benchmark
from hpcai_cli.commands.benchmark_all import benchmark_all
from hpcai_cli.commands.compress import compress
from hpcai_cli.commands.deploy import deploy
from hpcai_cli.commands.doctor import doctor
from hpcai_cli.commands.evaluate import evaluate
from hpcai_cli.commands.launch import launch
from hpcai_cli.commands.predict import predict
from hpcai_cli.commands.preprocess import preprocess
from hpcai_cli.commands.recipes import recipes
from hpcai_cli.commands.train import train
from hpcai_cli.commands.tune import tune
from hpcai_cli.errors import EXIT_INTERRUPTED, HpcaiError, StoppedEarly, is_aftermath


class _FrontDoor(TyperGroup):
    """Maps every way in which a command ends to its exit code, and never shows a traceback unasked."""

    def main(self, *args, **kwargs):
        """Run the command line; always ends in SystemExit."""
        # TensorFlow reads these when it loads; whatever the user has set stays.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        os.environ.setdefault("KERAS_BACKEND", "tensorflow")
        fast_loading.hasten()
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                # A file name need not be valid text; it is printed as the bytes that it is.
                stream.reconfigure(errors="surrogateescape")
        try:
            return super().main(*args, **kwargs)
        except HpcaiError as error:
            if isinstance(error, StoppedEarly):
                console.note(str(error))
            else:
                console.fail(str(error), collective=error.collective)
            _show_traceback()
            sys.exit(error.exit_code)
        except Exception as error:
            if is_aftermath(error):
                console.note("another rank has ended, and this one cannot go on without it")
                sys.exit(HpcaiError.exit_code)
            first_line = (str(error).strip() or "no message").split("\n")[0]
            console.fail(f"unexpected failure: {type(error).__name__}: {first_line}; "
                         "set HPCAI_DEBUG=1 and run it again for the details")
            _show_traceback()
            sys.exit(1)

    def invoke(self, ctx):
        """Run the command; Ctrl-C is told here, because Typer's main takes it before ours and says nothing."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            console.note("interrupted")
            sys.exit(EXIT_INTERRUPTED)


def _show_traceback() -> None:
    if os.environ.get("HPCAI_DEBUG"):
        traceback.print_exc()


def _version(value: bool) -> None:
    if value:
        console.result(f"hpcai {__version__}")
        raise typer.Exit


app = typer.Typer(name="hpcai", cls=_FrontDoor, no_args_is_help=True, pretty_exceptions_enable=False,
                  rich_markup_mode="rich", context_settings={"help_option_names": ["-h", "--help"]})


@app.callback(help="A deep-learning job from raw files to a served model, on one workstation or on a cluster.")
def hpcai(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True,
                                                help="Print the version.")] = False) -> None:
    """Hold the options that stand before the command."""


app.command()(preprocess)
app.command()(train)
app.command()(tune)
app.command()(evaluate)
app.command()(predict)
app.command()(compress)
app.add_typer(deploy, name="deploy")
benchmark.add_typer(benchmark_all)
app.add_typer(benchmark, name="benchmark")
app.add_typer(launch, name="launch")
app.add_typer(recipes, name="recipes")
app.command()(doctor)


def main() -> None:
    """Run hpcai; the entry point of the console script."""
    app()
