"""hpcai doctor: what is installed, what works, and the line that mends what does not."""

from dataclasses import asdict
from typing import Annotated

import typer

from hpcai_cli import console, options
from hpcai_cli.errors import MissingError, UsageError


def doctor(
    build_horovod: Annotated[bool, typer.Option(
        "--build-horovod", help="First build Horovod for the installed TensorFlow and install it.")] = False,
    with_mpi: Annotated[bool | None, typer.Option(
        "--with-mpi/--without-mpi", help="Build MPI in, or not; by default where mpicxx is found.")] = None,
    with_nccl: Annotated[bool, typer.Option(
        "--with-nccl", help="Build NCCL in, for GPUs; needs the CUDA toolkit.")] = False,
    json: options.Json = False,
) -> None:
    """Show what is installed, what works, and the line that mends what does not.

    Examples:
        $ hpcai doctor
        $ hpcai doctor --json
        $ hpcai doctor --build-horovod
        $ hpcai doctor --build-horovod --with-mpi --with-nccl

    Next: hpcai train mnist --np 2
    """
    if not build_horovod and (with_mpi is not None or with_nccl):
        raise UsageError("--with-mpi, --without-mpi and --with-nccl say how to build",
                         mend="add --build-horovod")
    from hpcai_cli.engine.environment import doctor as engine
    from hpcai_cli.engine.environment import horovod_build

    if build_horovod:
        horovod_build.build(with_mpi=with_mpi, with_nccl=with_nccl)
    findings = engine.examine()
    if json:
        shown = [{key: asdict(finding)[key] for key in ("name", "status", "value", "mend")} for finding in findings]
        console.result_json({"schema": "hpcai.doctor/1", "command": "doctor", "findings": shown,
                             "metrics": dict(finding.metric for finding in findings if finding.metric)})
    else:
        console.table("hpcai doctor", ["part", "status", "found", "mend"],
                      [[finding.name, finding.status, finding.value, finding.mend] for finding in findings])
    lacking = [finding for finding in findings if finding.required and finding.status == "missing"]
    if lacking:
        raise MissingError("; ".join(f"{finding.name}: {finding.value}" for finding in lacking),
                           mend="; ".join(dict.fromkeys(f"`{finding.mend}`" for finding in lacking)))
