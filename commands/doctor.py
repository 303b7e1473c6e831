"""hpcai doctor: what is installed, what works, and the line that mends what does not."""

from dataclasses import asdict
from typing import Annotated

import typer

from hpcai_cli import console, launch, options
from hpcai_cli.errors import MissingError, UsageError
from hpcai_cli.launchers import Ranks
from hpcai_cli.signals import sigterm_interrupts


@options.flattened
def doctor(
    build_horovod: Annotated[bool, typer.Option(
        "--build-horovod", help="First build Horovod for the installed TensorFlow and install it.")] = False,
    with_mpi: Annotated[bool | None, typer.Option(
        "--with-mpi/--without-mpi", help="Build MPI in, or not; by default where mpicxx is found.")] = None,
    with_nccl: Annotated[bool, typer.Option(
        "--with-nccl", help="Build NCCL in, for GPUs; needs the CUDA toolkit.")] = False,
    where: options.Where = options.HERE,
    json: options.Json = False,
) -> None:
    """Show what is installed, what works, and the line that mends what does not.

    With --hosts it asks the other hosts too, and lets ranks on all of them reduce and train a step together. Started by
    a launcher as one of several ranks, it tries just that with these.

    Examples:
        $ hpcai doctor
        $ hpcai doctor --json
        $ hpcai doctor --hosts a:4,b:4
        $ hpcai doctor --hosts a:4,b:4 --launcher horovodrun --interface eth0
        $ hpcai doctor --build-horovod
        $ hpcai doctor --build-horovod --with-mpi --with-nccl
        $ srun --mpi=pmix -N 2 hpcai doctor

    Next: hpcai train mnist --np 2
    """
    if not build_horovod and (with_mpi is not None or with_nccl):
        raise UsageError("--with-mpi, --without-mpi and --with-nccl say how to build",
                         mend="add --build-horovod")
    from hpcai_cli.engine.environment import doctor as engine
    from hpcai_cli.engine.environment import horovod_build

    if build_horovod:
        horovod_build.build(with_mpi=with_mpi, with_nccl=with_nccl)
    ranks = _ranks(where)
    if launch.place().size > 1:
        with console.quiet():
            from hpcai_cli.engine.environment import rank_trial
        findings = rank_trial.findings()
    else:
        with sigterm_interrupts():
            findings = engine.examine(ranks)
    _show(findings, json)
    lacking = [finding for finding in findings if finding.required and finding.status == "missing"]
    if lacking:
        error = MissingError("; ".join(f"{finding.name}: {finding.value}" for finding in lacking),
                             mend="; ".join(dict.fromkeys(f"`{finding.mend}`" for finding in lacking)))
        # Ranks have found it together.
        error.collective = True
        raise error


def _ranks(where: options.Where) -> Ranks | None:
    """Return the ranks that are to be tried over hosts, None without any."""
    if where == options.HERE:
        return None
    if where.hosts is None and where.hostfile is None:
        raise UsageError("--launcher, --interface and --launcher-options say how other hosts are reached",
                         mend="add --hosts a:1,b:1")
    ranks = where.ranks(None)
    if ranks.np < 2:
        raise UsageError("a single process has nobody to reduce with", expected="two or more, as in --hosts a:1,b:1",
                         received=ranks.np)
    return ranks


def _show(findings: list, json: bool) -> None:
    if json:
        shown = [{key: asdict(finding)[key] for key in ("name", "status", "value", "mend")} for finding in findings]
        console.result_json({"schema": "hpcai.doctor/1", "command": "doctor", "findings": shown, "metrics": {
            name: value for finding in findings for name, value in finding.metrics.items()}})
    else:
        console.table("hpcai doctor", ["part", "status", "found", "mend"],
                      [[finding.name, finding.status, finding.value, finding.mend] for finding in findings])
