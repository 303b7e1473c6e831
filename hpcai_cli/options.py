"""Options that several commands share, so that they read and work alike."""

import dataclasses
import inspect
import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated

import typer

from hpcai_cli import elastic as elastic_jobs
from hpcai_cli import hosts as host_lists
from hpcai_cli import launch, launchers
from hpcai_cli.errors import UsageError


def _set_verbose(value: bool) -> None:
    if value:
        # In the environment, so that the ranks that this process starts are verbose too.
        os.environ[launch.VERBOSE_VARIABLE] = "1"
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "0"


Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show what TensorFlow and Horovod print as they start.",
                                       callback=_set_verbose, is_eager=True)]
Data = Annotated[Path | None, typer.Option("--data", metavar="FILE.h5", help="Dataset file from `hpcai preprocess`.")]
Processes = Annotated[int | None, typer.Option("--np", min=1, metavar="N", help="Processes that work together; 1 by "
                                               "default, or as many as --hosts takes.", show_default=False)]
TrustModel = Annotated[bool, typer.Option("--trust-model", help="Load classes of your own from the model file; only "
                                          "for files that you made: they can run code.")]
Like = Annotated[Path | None, typer.Option("--like", metavar="RUN", help="The run that says recipe, classes and data, "
                                           "for a model file that lies in no run folder.")]
Energy = Annotated[bool, typer.Option("--energy", help="Measure the joules that the host takes, by the counters of its "
                                      "processors and GPUs.")]
PowerFile = Annotated[Path | None, typer.Option(metavar="FILE", help="Measure the joules by a power meter's file, to "
                                                "which lines of `unix_seconds watts` or `watts` come meanwhile.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set a field of the recipe; "
                                               "repeatable. `hpcai recipes show` lists them.")]
From = Annotated[Path | None, typer.Option("--from", metavar="FILE", help="Take settings from a recipe.json or a TOML "
                                           "file first.")]


@dataclass(frozen=True)
class Where:
    """Where the processes of --np run, and what starts them."""

    hosts: Annotated[str | None, typer.Option(metavar="A:N,B:N", help="Hosts and how many processes each takes; they "
                                              "are reached by ssh.")] = None
    hostfile: Annotated[Path | None, typer.Option(metavar="FILE", help="The same from a file, a line such as "
                                                  "`a slots=4` for each.")] = None
    launcher: Annotated[str, typer.Option(help="auto, horovodrun, mpirun or srun.")] = "auto"
    interface: Annotated[str, typer.Option(metavar="NAME", help="Network interface that the hosts talk over, such as "
                                           "eth0; by default the launcher's choice.", show_default=False)] = ""
    launcher_options: Annotated[str, typer.Option(metavar="WORDS", help="Further words for the launcher, as in "
                                                  "`--launcher-options=\"--tune settings.conf\"`.",
                                                  show_default=False)] = ""

    def ranks(self, np: int | None) -> launchers.Ranks | None:
        """Return the processes that are wanted; None when this one alone does the work.

        Raises:
            HpcaiError: what `launchers.chosen` raises, or the hosts or the words cannot be read.
        """
        if self.hosts is not None and self.hostfile is not None:
            raise UsageError("--hosts and --hostfile both name hosts", expected="one of them")
        named = host_lists.read_file(self.hostfile) if self.hostfile is not None else (
            host_lists.parse(self.hosts) if self.hosts is not None else ())
        return launchers.chosen(np, named=named, launcher=self.launcher, interface=self.interface,
                                options=self.further_words())

    def further_words(self) -> tuple[str, ...]:
        """Return the words for the launcher itself.

        Raises:
            UsageError: they cannot be read.
        """
        try:
            return tuple(shlex.split(self.launcher_options))
        except ValueError as error:
            raise UsageError(f"cannot read --launcher-options: {error}", received=self.launcher_options) from None


@dataclass(frozen=True)
class Fusion:
    """How Horovod joins gradients to larger messages."""

    fusion_mb: Annotated[float | None, typer.Option(min=0, max=65_536, metavar="MB", help="Gradients that travel "
                                                    "together at most; Horovod's default is 128.",
                                                    show_default=False)] = None
    cycle_ms: Annotated[float | None, typer.Option(min=0.001, max=10_000, metavar="MS", help="How long Horovod "
                                                   "collects them for; 0.5 over MPI, 1 over Gloo by default.",
                                                   show_default=False)] = None
    autotune: Annotated[bool, typer.Option("--autotune", help="Let Horovod try both during the training, and tell the "
                                           "best.")] = False

    def apply(self) -> None:
        """Set Horovod's variables, which the ranks that this process starts get too.

        Raises:
            UsageError: what is to be tuned is given.
        """
        if self.autotune and (self.fusion_mb is not None or self.cycle_ms is not None):
            raise UsageError("--autotune finds --fusion-mb and --cycle-ms", expected="one or the other")
        if self.fusion_mb is not None:
            os.environ["HOROVOD_FUSION_THRESHOLD"] = str(round(self.fusion_mb * 2**20))
        if self.cycle_ms is not None:
            os.environ["HOROVOD_CYCLE_TIME"] = str(self.cycle_ms)
        if self.autotune:
            os.environ["HOROVOD_AUTOTUNE"] = "1"
            for name in ("HOROVOD_FUSION_THRESHOLD", "HOROVOD_CYCLE_TIME"):
                os.environ.pop(name, None)


@dataclass(frozen=True)
class Survival:
    """How a job goes on without processes that are lost, and with those that come back."""

    elastic: Annotated[bool, typer.Option("--elastic", help="Go on without processes that are lost, and with those "
                                          "that come back.")] = False
    min_np: Annotated[int | None, typer.Option("--min-np", min=1, metavar="N", help="The fewest to go on with; 1 by "
                                               "default.", show_default=False)] = None
    max_np: Annotated[int | None, typer.Option("--max-np", min=1, metavar="N", help="The most; as many as there are "
                                               "places by default.", show_default=False)] = None
    discovery: Annotated[Path | None, typer.Option(metavar="PROGRAM", help="Prints the hosts that can be had now, a "
                                                   "line such as `a:4` for each; it is asked each second.")] = None
    elastic_timeout: Annotated[int | None, typer.Option(min=1, metavar="SECONDS", help="How long to wait for --min-np "
                                                        f"processes; {elastic_jobs.TIMEOUT} by default.",
                                                        show_default=False)] = None

    def ranks(self, np: int | None, where: Where) -> launchers.Ranks | None:
        """Return the processes that are wanted; None when this one alone does the work.

        Raises:
            HpcaiError: what `launchers.chosen` raises, or what was asked for contradicts itself.
        """
        if not self.elastic:
            given = {"--min-np": self.min_np, "--max-np": self.max_np, "--discovery": self.discovery,
                     "--elastic-timeout": self.elastic_timeout}
            if named := words(given):
                raise UsageError(f"{named[0]} says how an elastic job goes on", expected="--elastic with it")
            return where.ranks(np)
        if where.launcher not in ("auto", "horovodrun"):
            raise UsageError("--elastic jobs are started by horovodrun", expected="no other --launcher",
                             received=where.launcher)
        least = self.min_np or 1
        how = elastic_jobs.Elastic(least, self.max_np, self.discovery, self.elastic_timeout or elastic_jobs.TIMEOUT)
        if self.discovery:
            if where.hosts is not None or where.hostfile is not None:
                raise UsageError("--discovery names the hosts", expected="no --hosts or --hostfile with it")
            count, found = np or least, elastic_jobs.discovered(self.discovery)
            launch.require_horovod(count)
            is_here = all(host_lists.is_here(host.name) for host in found)
            if is_here and not where.interface:
                raise UsageError("--discovery names no other host just now, so that nothing shows the way to them",
                                 expected="--interface NAME, such as eth0, or lo where there will be none")
            ranks = launchers.Ranks(count, "horovodrun", () if is_here else found, where.interface,
                                    where.further_words())
        elif where.hosts is not None or where.hostfile is not None or (np or self.max_np or 1) > 1:
            ranks = dataclasses.replace(where, launcher="horovodrun").ranks(np or self.max_np)
        else:
            ranks = None
        if ranks is None or not self.discovery and (ranks.np if not ranks.hosts else len(ranks.hosts)) < 2:
            raise UsageError("a host that has lost a process is left out for a while, and an elastic job goes on with "
                             "another", expected="--np N of at least 2, or two --hosts", received=np)
        if not least <= ranks.np <= (self.max_np or ranks.np):
            raise UsageError("an elastic job begins with --np processes", received=ranks.np,
                             expected=f"a number from {least} to {self.max_np or 'more'}",
                             mend="change --np, --min-np or --max-np")
        return dataclasses.replace(ranks, elastic=how)


@dataclass(frozen=True)
class Supervision:
    """What is done about processes that die or hang."""

    heartbeat: Annotated[float, typer.Option(min=0, max=86_400, metavar="SECONDS", help="A process of several that for "
                                             "so long shows no sign of life, or no progress, hangs; 0 for never.")] = 30
    max_restarts: Annotated[int | None, typer.Option(min=0, metavar="N", help="Start processes that died or hang again "
                                                     "from the newest checkpoint, so many times; 3 by default for "
                                                     "several, 0 for one.", show_default=False)] = None


SUPERVISED = Supervision()
"""As by default."""
UNFUSED = Fusion()
"""Horovod's own settings."""
HERE = Where()
"""Nothing of it was given."""
MORTAL = Survival()
"""A process that is lost ends the job."""


def flattened(function: Callable) -> Callable:
    """Return the function with each parameter that is a dataclass of options replaced by these options."""
    signature, groups, shown = inspect.signature(function), {}, []
    for each in signature.parameters.values():
        if is_dataclass(each.annotation):
            groups[each.name] = each.annotation
            shown += inspect.signature(each.annotation).parameters.values()
        else:
            shown.append(each)

    def command(**given):
        built = {name: group(**{field.name: given.pop(field.name) for field in fields(group)})
                 for name, group in groups.items()}
        return function(**given, **built)

    command.__name__, command.__doc__, command.__module__ = function.__name__, function.__doc__, function.__module__
    command.__wrapped__ = function
    command.__signature__ = inspect.Signature([each.replace(kind=each.KEYWORD_ONLY) for each in shown])
    command.__annotations__ = {each.name: each.annotation for each in shown}
    return command


def words(given: Mapping[str, object]) -> list[str]:
    """Return options as words of a command line, none for those that were not given; a list repeats its option."""
    found = []
    for option, value in given.items():
        for each in value if isinstance(value, list) else [value]:
            if each is not None and each is not False and each != "":
                found += [option] if each is True else [option, str(each)]
    return found
