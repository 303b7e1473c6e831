"""hpcai train: a recipe and a dataset file to a trained run."""

import os
import platform
import shlex
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

from hpcai_cli import catalog, console, launch, options
from hpcai_cli.cache import cache_folder
from hpcai_cli.errors import HpcaiError, MissingError, UsageError
from hpcai_cli.recipe import Recipe, parse_assignments, read_values
from hpcai_cli.run import Run, write_json
from hpcai_cli.signals import StopRequest


def train(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="A name from `hpcai recipes list`, or a recipe "
                                                 "file.")] = None,
    data: options.Data = None,
    np: options.Processes = 1,
    output: Annotated[Path | None, typer.Option(metavar="RUN", help="The run's folder; runs/RECIPE-N by default.")] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Continue a run from its newest checkpoint.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Short for --set epochs=N.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Short for --set batch_size=N, per process.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Short for --set learning_rate=X.")] = None,
    precision: Annotated[str | None, typer.Option(help="Short for --set precision=auto|float32|mixed_bfloat16|"
                                                  "mixed_float16.")] = None,
    seed: Annotated[int | None, typer.Option(help="Short for --set seed=N.")] = None,
    settings: options.Set = None,
    from_file: options.From = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard's event files too.")] = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Train a recipe, alone or in several processes, and evaluate the best epoch on the test split.

    Ctrl-C, SIGTERM and SIGUSR1 end in a checkpoint and exit code 75; --resume goes on from there.

    Examples:
        $ hpcai train mnist
        $ hpcai train mnist --data data/mnist.h5 --np 2 --json
        $ hpcai train mnist --set architecture=tutorial --epochs 3 --batch-size 32
        $ hpcai train ./mine.py --data mine.h5 --output runs/first
        $ hpcai train --resume runs/first
        $ horovodrun -np 2 hpcai train mnist --data data/mnist.h5

    Next: hpcai evaluate RUN
    """
    short = {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate, "precision": precision,
             "seed": seed}
    assignments = {**(read_values(from_file) if from_file else {}), **parse_assignments(settings or []),
                   **{name: str(value) for name, value in short.items() if value is not None}}
    launch.register()
    with StopRequest() as stop:
        entry, chosen = _entry_and_recipe(recipe, resume, output, assignments)
        if tensorboard and launch.missing_package("tensorboard"):
            raise MissingError("--tensorboard needs a package that is not installed",
                               mend="run `pip install 'hpcai[tensorboard]'`", received="tensorboard")
        if np > 1:
            result = None
            _train_in_ranks(np, entry, chosen, data, output, resume, assignments, tensorboard, json)
        else:
            result = _train_here(entry, chosen, data, output, resume, stop, tensorboard)
    if result is None:
        return
    if json:
        console.result_json(result)
        return
    metrics = result["metrics"]
    console.table(f"{result['run']}: {result['epochs']} epochs, {result['steps']:,} steps, {result['world_size']} "
                  f"process{'es' if result['world_size'] > 1 else ''}", ("metric", "value"), list(metrics.items()))
    console.result(f"next: hpcai evaluate {result['run']}")


def _entry_and_recipe(name: str | None, resume: Path | None, output: Path | None,
                      assignments: dict[str, str]) -> tuple[catalog.CatalogEntry, Recipe]:
    if resume is not None:
        if output is not None:
            raise UsageError("--resume continues a run in its own folder", expected="--resume or --output, not both",
                             received=str(output))
        run = Run.open(resume)
        entry = catalog.find(name or run.manifest()["recipe_reference"])
        chosen = run.recipe()
        if chosen.name != entry.recipe.name:
            raise UsageError(f"{resume} is a run of recipe {chosen.name}", expected="the recipe that it began with",
                             mend=f"run `hpcai train --resume {resume}`", received=name)
        return entry, chosen.override(assignments)
    if name is None:
        raise UsageError("train needs a recipe", expected="a name, or --resume RUN",
                         mend="run `hpcai recipes list` for all of them")
    entry = catalog.find(name)
    return entry, entry.recipe.override(assignments)


def _train_in_ranks(np, entry, chosen, data, output, resume, assignments, tensorboard, json) -> None:
    """Check all that can be known, make the run's folder, and start this same command np times."""
    launch.require_horovod(np)
    with console.quiet():
        from hpcai_cli.engine.distributed import Serial

    run, file = _prepare(entry, chosen, data, output, resume, Serial())
    arguments = ["train", entry.reference, "--data", str(file), *(["--resume"] if resume else ["--output"]),
                 str(run.folder), *(["--tensorboard"] if tensorboard else []), *(["--json"] if json else [])]
    for key, value in assignments.items():
        arguments += ["--set", f"{key}={value}"]
    outcome = launch.run_ranks(np, arguments)
    if outcome.exit_code == 0:
        return
    if not outcome.reported:
        who = "horovodrun" if outcome.rank is None else f"rank {outcome.rank}"
        error = HpcaiError(f"{who} ended without a word of its own", mend=f"run it again with --verbose; the newest "
                           f"checkpoint is used by `hpcai train --resume {run.folder}`",
                           received=outcome.launcher_words)
        run.record_failure(rank=outcome.rank, error=error, exit_code=1)
        raise error
    raise typer.Exit(outcome.exit_code)


def _train_here(entry, chosen, data, output, resume, stop, tensorboard) -> dict:
    with console.quiet():
        from hpcai_cli.engine import distributed, hardware
        from hpcai_cli.engine.store import Dataset
        from hpcai_cli.engine.training import Job
        from hpcai_cli.engine.training import train as run_training

        ranks = distributed.start()
    threads = hardware.set_up(local_rank=ranks.local_rank, local_size=ranks.local_size)
    policy, reason = hardware.choose_precision(chosen.precision)
    hardware.set_precision(policy)
    folder, file = distributed.on_rank_zero(ranks, lambda: [
        str(part) for part in (lambda run, path: (run.folder, path))(*_prepare(entry, chosen, data, output, resume, ranks))])
    run = Run(Path(folder))
    dataset = Dataset(Path(file))
    if ranks.rank == 0:
        _describe(run, entry, chosen, dataset, ranks.size, policy, reason, threads)
    console.note(f"{run.folder}: {chosen.name} on {file}, {ranks.size} process{'es' if ranks.size > 1 else ''} with "
                 f"{threads} thread{'s' if threads > 1 else ''}, {policy}: {reason}")
    try:
        result = run_training(Job(chosen, run, dataset, ranks, entry.function("build_model"), entry.function("augment"),
                                  stop, tensorboard), resume=resume is not None)
    except HpcaiError as error:
        run.record_failure(rank=ranks.rank, error=error, exit_code=error.exit_code)
        if error.collective:
            ranks.stop()
        raise
    except Exception as error:
        run.record_failure(rank=ranks.rank, error=error, exit_code=1)
        raise
    ranks.stop()
    return result


def _prepare(entry, chosen, data, output, resume, ranks) -> tuple[Run, Path]:
    """Find the data, check that they fit, and make or open the run's folder; everything that can fail early."""
    with console.quiet():
        from hpcai_cli.engine.model import check_data
        from hpcai_cli.engine.store import Dataset

    run = Run.open(resume) if resume else None
    file = data or (Path(run.manifest()["data"]) if run else _default_data(entry))
    check_data(chosen, Dataset(file))
    return run or Run.create(chosen.name, output), file


def _default_data(entry: catalog.CatalogEntry) -> Path:
    """Return data/RECIPE.h5 where it is, else the built-in sample, and say so."""
    source = entry.data_source()
    file = Path("data") / f"{source.recipe.name}.h5"
    if file.exists():
        return file
    if source.function("sample") is None:
        raise UsageError(f"{file} does not exist and recipe {source.recipe.name} has no built-in sample",
                         expected="--data FILE.h5", mend=f"run `hpcai preprocess {source.recipe.name}`")
    from hpcai_cli.engine.preprocessing import preprocess

    sample = cache_folder() / "samples" / f"{source.recipe.name}.h5"
    preprocess(source.recipe, load=None, sample=source.function("sample"), downloads=None, source="sample",
               output=sample, force=not sample.exists())
    console.note(f"no --data and no {file}: training on the built-in sample; `hpcai preprocess {source.recipe.name}` "
                 "brings the whole data")
    return sample


def _describe(run: Run, entry, chosen: Recipe, dataset, size: int, policy: str, reason: str, threads: int) -> None:
    """Write recipe.json, the whole truth of what is trained, and manifest.json, of where and with what."""
    write_json(run.recipe_file, chosen.to_json())
    write_json(run.manifest_file, {
        "command": shlex.join(["hpcai", *sys.argv[1:]]), "recipe_reference": entry.reference,
        "data": os.path.abspath(dataset.path), "data_fingerprint": dataset.fingerprint,
        "class_names": list(dataset.class_names), "seed": chosen.seed, "world_size": size,
        "precision": policy, "precision_reason": reason, "threads_per_rank": threads, "host": socket.gethostname(),
        "python": platform.python_version(), "git_commit": _git_commit(),
        "versions": {name: _version(name) for name in ("hpcai", "tensorflow", "keras", "horovod", "h5py", "numpy")}})


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Return the commit of the folder that the user works in, None where it is no repository."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
