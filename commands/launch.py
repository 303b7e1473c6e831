"""hpcai launch: a command as a job of Slurm or in the background, and what became of it."""

import dataclasses
import time
from pathlib import Path
from typing import Annotated

import typer

from hpcai_cli import console, job_script, jobs, kubernetes, launchers, options, site, slurm
from hpcai_cli.errors import UsageError
from hpcai_cli.jobs import Job
from hpcai_cli.run import write_bytes

launch = typer.Typer(help="Hand a command to a cluster's scheduler, or run it in the background; ask what became of "
                     "it.", no_args_is_help=True)

_POLL_SECONDS = 0.5
Words = Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="A command of hpcai, such as `train mnist "
                                            "--data data/mnist.h5`.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the script and start nothing.")]
Name = Annotated[str, typer.Argument(metavar="JOB", help="Its name, number or folder.")]


@launch.command(name="slurm")
def slurm_(
    context: typer.Context,
    words: Words,
    nodes: Annotated[int | None, typer.Option(min=1, max=100_000, help="Hosts.")] = None,
    tasks_per_node: Annotated[int | None, typer.Option(min=1, max=10_000, help="Ranks of each host: one for each GPU, "
                                                       "or for some cores.")] = None,
    cpus_per_task: Annotated[int | None, typer.Option(min=1, max=10_000, help="Cores of each rank.")] = None,
    gpus_per_task: Annotated[int | None, typer.Option(min=0, max=64, help="GPUs of each rank.")] = None,
    time: Annotated[str | None, typer.Option(metavar="HH:MM:SS", help="Limit, after which Slurm ends the job.")] = None,
    partition: Annotated[str | None, typer.Option(metavar="NAME", help="Where it is queued.")] = None,
    account: Annotated[str | None, typer.Option(metavar="NAME", help="Who pays.")] = None,
    array: Annotated[str | None, typer.Option(metavar="1-8%4", help="A job for each index, which stands for {task} in "
                                              "the command.")] = None,
    signal_before: Annotated[int | None, typer.Option(min=0, max=65_535, metavar="SECONDS", help="How long before its "
                                                      "limit a job saves itself; 0 for never.")] = None,
    requeue: Annotated[bool | None, typer.Option("--requeue/--no-requeue", help="Queue a job again that has saved "
                                                 "itself at its limit, so that it goes on.")] = None,
    stage: Annotated[str | None, typer.Option(metavar="FOLDER", help="Copy the dataset file there first, on each "
                                              "host's own disk.")] = None,
    modules: Annotated[list[str] | None, typer.Option("--module", metavar="NAME", help="`module load` it first. "
                                                      "Repeatable.")] = None,
    container: Annotated[str | None, typer.Option(metavar="IMAGE", help="Run the ranks in this image, by "
                                                  "apptainer.")] = None,
    launcher: Annotated[str | None, typer.Option(help="auto, srun, mpirun or horovodrun.")] = None,
    further: Annotated[list[str] | None, typer.Option("--option", metavar="--NAME=VALUE", help="A further option of "
                                                      "sbatch. Repeatable.")] = None,
    dry_run: DryRun = False,
    json: options.Json = False,
) -> None:
    """Write a job script of Slurm and hand it in.

    A job saves itself before its limit, is queued again and goes on where it was. What is not given here is taken from
    the site's defaults: section [slurm] of $HPCAI_SITE, ~/.config/hpcai/site.toml or /etc/hpcai/site.toml.

    Examples:
        $ hpcai launch slurm --nodes 2 --tasks-per-node 4 --gpus-per-task 1 --time 4:00:00 -- train dogs-vs-cats
        $ hpcai launch slurm --dry-run -- train mnist --data data/mnist.h5 --epochs 20
        $ hpcai launch slurm --array 1-8 -- train mnist --seed {task}

    Next: hpcai launch status
    """
    given = {"nodes": nodes, "tasks_per_node": tasks_per_node, "cpus_per_task": cpus_per_task,
             "gpus_per_task": gpus_per_task, "time": time, "partition": partition, "account": account, "array": array,
             "signal_before": signal_before, "requeue": requeue, "stage": stage,
             "modules": None if modules is None else tuple(modules), "container": container, "launcher": launcher,
             "options": None if further is None else tuple(further)}
    wanted = _wanted(slurm.Resources, "slurm", given)
    command = job_script.Command(tuple(words), wanted.tasks, _launcher(wanted.launcher), tuple(wanted.program()))
    _check(command, context, is_here=True)
    folder = _folder(command.name, dry_run)
    log = folder / ("log-%a.txt" if wanted.array else "log.txt")
    script = job_script.text(command, folder, header=wanted.header(folder.name, str(log)), before=wanted.before(),
                             stage=wanted.stage, requeue=wanted.requeue)
    if dry_run:
        console.result(script.rstrip("\n"))
        return
    _keep_script(folder, script)
    try:
        number = slurm.submit(script)
    except BaseException:
        _drop(folder)
        raise
    _started(jobs.keep(folder, "slurm", number, ["hpcai", *words]), json)


@launch.command(name="kubernetes")
def kubernetes_(
    context: typer.Context,
    words: Words,
    image: Annotated[str | None, typer.Option(metavar="NAME", help="Image with hpcai, Horovod built with Open MPI, and "
                                              "sshd.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, max=100_000, help="Pods that train.")] = None,
    slots_per_worker: Annotated[int | None, typer.Option(min=1, max=1000, help="Ranks of each.")] = None,
    cpus: Annotated[str | None, typer.Option(metavar="QUANTITY", help="Of each worker, as 8 or 500m.")] = None,
    memory: Annotated[str | None, typer.Option(metavar="QUANTITY", help="Of each worker, as 32Gi.")] = None,
    gpus: Annotated[int | None, typer.Option(min=0, max=64, help="Of each worker.")] = None,
    claim: Annotated[str | None, typer.Option(metavar="NAME", help="Volume claim with the data, which all pods mount "
                                              "at /work; a new one by default.")] = None,
    storage: Annotated[str | None, typer.Option(metavar="QUANTITY", help="Of a new claim, as 100Gi.")] = None,
    storage_class: Annotated[str | None, typer.Option(metavar="NAME", help="Of a new claim.")] = None,
    namespace: Annotated[str | None, typer.Option(metavar="NAME", help="Where the job lives.")] = None,
    limit_seconds: Annotated[int | None, typer.Option(min=0, help="After which the job is ended; 0 for never.")] = None,
    restarts: Annotated[int | None, typer.Option(min=0, max=1000, help="How often a job that failed or was evicted is "
                                                 "started again, to go on.")] = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Of the job; by default by the command.")] = None,
    output: Annotated[Path | None, typer.Option(metavar="FILE.yaml", help="Where the manifest goes; stdout by "
                                                "default.")] = None,
) -> None:
    """Write a job of Kubernetes: an MPIJob of Kubeflow's MPI operator, with its script and its volume claim.

    A job that is started again goes on from its last checkpoint. What is not given here is taken from section
    [kubernetes] of the site's defaults.

    Examples:
        $ hpcai launch kubernetes --image hpcai:1 --workers 4 --gpus 1 --claim datasets -- train mnist --epochs 20
        $ hpcai launch kubernetes --image hpcai:1 --output job.yaml -- train ./mine.py --data mine.h5

    Then: kubectl apply -f FILE.yaml

    Next: hpcai evaluate RUN
    """
    given = {"image": image, "workers": workers, "slots_per_worker": slots_per_worker, "cpus": cpus, "memory": memory,
             "gpus": gpus, "claim": claim, "storage": storage, "storage_class": storage_class, "namespace": namespace,
             "limit_seconds": limit_seconds, "restarts": restarts}
    wanted = _wanted(kubernetes.Resources, "kubernetes", given)
    command = job_script.Command(tuple(words), wanted.tasks)
    _check(command, context, is_here=False)
    text = kubernetes.manifest(command, wanted, name or kubernetes.name_of(command))
    if output is None:
        console.result(text, end="")
        return
    write_bytes(output, text.encode())
    console.result(f"next: kubectl apply -f {output}")


@launch.command()
def local(context: typer.Context, words: Words, np: options.Processes = None, launcher: Annotated[str, typer.Option(
        help="auto, mpirun or horovodrun.")] = "auto", dry_run: DryRun = False, json: options.Json = False) -> None:
    """Run a command in the background on this host; it goes on when the terminal is closed.

    Examples:
        $ hpcai launch local --np 2 -- train mnist --data data/mnist.h5

    Next: hpcai launch logs JOB --follow
    """
    command = job_script.Command(tuple(words), np or 1, _launcher(launcher))
    _check(command, context, is_here=True)
    folder = _folder(command.name, dry_run)
    script = job_script.text(command, folder)
    if dry_run:
        console.result(script.rstrip("\n"))
        return
    _keep_script(folder, script)
    number, began = jobs.start_here(folder)
    _started(jobs.keep(folder, "local", number, ["hpcai", *words], began), json)


@launch.command()
def status(job: Annotated[str | None, typer.Argument(metavar="[JOB]", help="One of them; all by default.")] = None,
           json: options.Json = False) -> None:
    """Show what became of the jobs that were started from this folder.

    Examples:
        $ hpcai launch status
        $ hpcai launch status train-mnist-1 --json
    """
    chosen = [Job.open(job)] if job else jobs.everything()
    queued = slurm.states(each.number for each in chosen if each.kind == "slurm")
    found = [{"job": each.folder.name, "kind": each.kind, "number": each.number,
              "state": each.state(queued.get(each.number, "")), "said": _last_line(each), "command": each.command}
             for each in chosen]
    if json:
        console.result_json({"schema": "hpcai.jobs/1", "command": "launch status", "jobs": found, "metrics": {}})
        return
    console.table("jobs", ("job", "kind", "number", "state", "last line"),
                  [(each["job"], each["kind"], each["number"], each["state"], each["said"]) for each in found])


@launch.command()
def logs(job: Name, follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job is "
                                                         "over.")] = False) -> None:
    """Print what a job has printed.

    Examples:
        $ hpcai launch logs train-mnist-1 --follow
    """
    opened = Job.open(job)
    places: dict[Path, int] = {}
    while True:
        is_over = not follow or not _is_active(opened)
        for path in opened.logs:
            with path.open("rb") as stream:
                stream.seek(places.get(path, 0))
                content = stream.read()
                places[path] = stream.tell()
            if content:
                console.result(content.decode(errors="replace"), end="")
        if is_over:
            return
        time.sleep(_POLL_SECONDS)


@launch.command()
def cancel(job: Name) -> None:
    """Ask a job to save itself and end; `hpcai train --resume RUN` goes on from there.

    Examples:
        $ hpcai launch cancel train-mnist-1
    """
    opened = Job.open(job)
    opened.cancel()
    console.result(f"{opened.folder.name} was asked to save itself and end")


def _wanted(kind: type, section: str, given: dict):
    """Return what the user and the site want of a scheduler, checked."""
    wanted = dataclasses.replace(kind(**site.defaults(section, kind)),
                                 **{name: value for name, value in given.items() if value is not None})
    wanted.check()
    return wanted


def _check(command: job_script.Command, context: typer.Context, *, is_here: bool) -> None:
    """Check the command as far as it can be without running it: now, and not in a log when its turn has come.

    Args:
        is_here: whether the job sees the files of this host.
    """
    command.check()
    # By the program's own parser, which ends with what is wrong and how it is used.
    words, parser = [word.replace(job_script.TASK, "1") for word in command.words], context.find_root().command
    while hasattr(parser, "resolve_command"):
        name, parser, words = parser.resolve_command(context.find_root(), words)
    parser.make_context(f"hpcai {name}", words)
    data = command.option("--data")
    if is_here and data and job_script.TASK not in data and not Path(data).exists():
        raise UsageError("the job's data do not exist", expected="a dataset file", received=data,
                         mend="write it with `hpcai preprocess`")


def _launcher(name: str) -> str:
    if name not in launchers.NAMES:
        raise UsageError("there is no such launcher", expected=f"one of {', '.join(launchers.NAMES)}", received=name)
    return name


def _folder(name: str, dry_run: bool) -> Path:
    return (jobs.FOLDER / f"{name}-N" if dry_run else jobs.new_folder(name)).absolute()


def _keep_script(folder: Path, script: str) -> None:
    write_bytes(folder / "script.sh", script.encode())


def _drop(folder: Path) -> None:
    (folder / "script.sh").unlink(missing_ok=True)
    folder.rmdir()


def _started(job: Job, json: bool) -> None:
    name = job.folder.name
    if json:
        console.result_json({"schema": "hpcai.launch/1", "command": f"launch {job.kind}", "job": name,
                             "number": job.number, "folder": str(job.folder), "metrics": {}})
    else:
        console.result(f"{name} is {job.kind} job {job.number}\nnext: hpcai launch status, or hpcai launch logs {name}")


def _is_active(job: Job) -> bool:
    queued = slurm.states([job.number]).get(job.number, "") if job.kind == "slurm" else ""
    return job.state(queued).startswith(jobs.ACTIVE)


def _last_line(job: Job) -> str:
    """Return what the job has said last, of the end of its newest log."""
    newest = max(job.logs, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        return ""
    with newest.open("rb") as stream:
        stream.seek(max(0, newest.stat().st_size - 4096))
        lines = [line for line in stream.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:80] if lines else ""
