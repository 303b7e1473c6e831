"""The options that all benchmarks have, and how a command gets them beside its own."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from typer.models import ArgumentInfo, OptionInfo

from hpcai_cli import options
from hpcai_cli.launchers import Ranks


@dataclass(frozen=True)
class Common:
    """What every benchmark can be asked for."""

    output: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Where the result is kept; by default "
                                                "benchmarks/NAME-TIME.")] = None
    compare: Annotated[Path | None, typer.Option(metavar="OLD.json", help="An earlier result of this machine to "
                                                 "compare with, the file or its folder.")] = None
    fail_on: Annotated[str, typer.Option(metavar="SHARE", help="With --compare, exit with code 5 when a figure got "
                                         "worse by more, and by more than chance.")] = "5%"
    check: Annotated[bool, typer.Option("--check", help="Exit with code 5 when a figure misses its limit.")] = False
    energy: options.Energy = False
    power_file: options.PowerFile = None
    json: options.Json = False
    verbose: options.Verbose = False


class InRanks:
    """What a command returns to be run again in so many processes, of which rank 0 keeps and shows the result."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks


def with_common(function: Callable[..., Iterable | InRanks], run: Callable) -> Callable[..., None]:
    """Return a command: the function's own options, then those that all have.

    Args:
        function: checks what was asked for, and returns what is measured one by one.
        run: run(name, measured, common, again) measures; `again` are the words of the command for each of several
            processes.
    """
    function = options.flattened(function)
    parameters = list(inspect.signature(function).parameters.values())

    @functools.wraps(function)
    def command(*, common: Common, **given) -> None:
        again = ["benchmark", function.__name__, *_words(flat.__signature__.parameters.values(), given | vars(common))]
        run(function.__name__, lambda: function(**given), common, again)

    command.__signature__ = inspect.Signature(
        [*parameters, inspect.Parameter("common", inspect.Parameter.KEYWORD_ONLY, annotation=Common)])
    flat = options.flattened(command)
    return flat


def _words(parameters: Iterable[inspect.Parameter], given: Mapping[str, object]) -> list[str]:
    """Return a command line's words, without those that say how many processes there are and where."""
    found, left_out = [], {"np", *options.Where.__dataclass_fields__}
    for each in parameters:
        declared = next(one for one in each.annotation.__metadata__ if isinstance(one, (ArgumentInfo, OptionInfo)))
        if each.name in left_out or given[each.name] == each.default:
            continue
        option = next(iter(declared.param_decls or ()), f"--{each.name.replace('_', '-')}")
        words = options.words({option: given[each.name]})
        found += words[1::2] if isinstance(declared, ArgumentInfo) else words
    return found
