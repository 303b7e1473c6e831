"""A training from the request to the result: checks, run folder, ranks, hardware, the loop, what went wrong."""

import contextlib
import dataclasses
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from hpcai_cli import console, launch, run_lock
from hpcai_cli.cache import cache_folder
from hpcai_cli.cadence import Cadence
from hpcai_cli.engine import checkpoint, continuation, rank_groups
from hpcai_cli.engine.power_file import PowerFile
from hpcai_cli.engine.store import Dataset, check_fits
from hpcai_cli.errors import EXIT_STOPPED, DataError, HpcaiError, UsageError, is_aftermath
from hpcai_cli.pulse import Pulse
from hpcai_cli.recipe import Recipe
from hpcai_cli.run import Run, write_json
from hpcai_cli.signals import StopRequest
from hpcai_cli.time_limit import TimeLimit

_ENDING_SECONDS = 10
"""How long a rank waits for the end of the training that was in its run's folder before."""


@dataclass(frozen=True)
class Request:
    """What the user asked for, resolved as far as it can be without touching data or hardware."""

    recipe: Recipe
    reference: str
    """What finds the recipe again: its name or the path of its file."""
    build_model: Callable
    augment: Callable | None
    """augment(inputs, seed, recipe) -> inputs, within the compiled step."""
    final_augment: Callable | None
    """The same for the last epochs, by the recipe's final_share."""
    adapt: Callable | None
    """adapt(model, inputs, labels, recipe): fits what the model takes from the training split, before step one."""
    data_recipe: Recipe
    """The recipe whose data this one trains on."""
    sample: Callable | None
    data: Path | None = None
    output: Path | None = None
    resume: Path | None = None
    tensorboard: bool = False
    profile: tuple[int, int] | None = None
    """First and last step to look into, counted from 1."""
    energy: bool = False
    power_file: Path | None = None
    """A power meter's, in place of the hosts' own counters."""
    tensor_parallel: int = 1
    """Ranks that share a model."""
    cadence: Cadence = Cadence()
    max_time: float | None = None
    """Seconds after which the training is to have saved itself."""
    until_epoch: int | None = None
    """The epoch after which it saves itself and ends."""


def prepare(request: Request, *, size: int) -> tuple[Run, Path]:
    """Find the data, check that they fit, and make or open the run's folder: all that can fail before the start.

    Args:
        size: number of ranks that will train.

    Raises:
        DataError: the data are missing or don't fit the recipe, or the power meter's file cannot be read.
        UsageError: the run's folder cannot be made, the run has no such steps to profile, or the model cannot be split
            over so many ranks.
    """
    run = Run.open(request.resume) if request.resume else None
    file = Path(run.manifest()["data"]) if run and not request.data else data_of(request)
    dataset = Dataset(file)
    recipe = fitted(request.recipe, dataset)
    rank_groups.check(recipe, parts=request.tensor_parallel, size=size, profiled=request.profile is not None)
    if request.profile:
        _check_profile(request.profile, recipe, dataset, size)
    if request.power_file:
        PowerFile(request.power_file)
    if run and not request.output:
        return run, file
    made = Run.create(request.recipe.name, request.output)
    if run:
        _copy(run, made)
    return made, file


def run_here(request: Request, stop: StopRequest, pulse: Pulse) -> dict:
    """Train in this process, one of several or alone, and return the result.

    Raises:
        HpcaiError: what `hpcai_cli.engine.training.train` raises; failure.json in the run folder says it too.
    """
    # TensorFlow loads here and not at import, so that a process that only starts others does without it.
    with console.quiet():
        from hpcai_cli.engine import autotune, distributed, elastic, hardware, profiled_ranks

        pulse.begin()
        autotune_log = autotune.begin()
        groups = rank_groups.groups(request.tensor_parallel)
        ranks = profiled_ranks.join() if request.profile else distributed.start(groups)
    threads = hardware.set_up(local_rank=ranks.local_rank, local_size=ranks.local_size)
    crew, limit = elastic.Crew(ranks, pulse) if ranks.is_elastic else None, TimeLimit(request.max_time)
    with contextlib.ExitStack() as until_end:
        return elastic.until_done(crew, lambda: _train(
            request, stop, pulse, ranks, crew, threads, limit, autotune_log, until_end))


def _train(request: Request, stop: StopRequest, pulse: Pulse, ranks, crew, threads: int, limit: TimeLimit,
           autotune_log: Path | None, until_end: contextlib.ExitStack) -> dict:
    """Train with the ranks that there are, and leave what is to be ended afterwards to `until_end`."""
    from hpcai_cli.engine import autotune, distributed, elastic, energy, hardware, profiling, replicas, training

    if crew:
        crew.meet()
        # A rank that comes has not seen the beginning.
        limit.take(ranks.broadcast_json(limit.left(), crew.holder or 0))
    # Rank 0 chooses for all: in a mixed cluster the ranks would compute in different precisions, unseen by the proof.
    policy, reason = ranks.broadcast_json(hardware.choose_precision(request.recipe.precision))
    hardware.set_precision(policy)
    request = dataclasses.replace(request, recipe=dataclasses.replace(request.recipe, precision=policy))
    facts = {"world_size": ranks.size, "hosts": launch.place().hosts, "threads_per_rank": threads,
             "precision": policy, "precision_reason": reason, "tensor_parallel": request.tensor_parallel}
    if ranks.size > 1:
        facts["horovod"] = autotune.settings()
    folder, file, resume = distributed.on_rank_zero(ranks, lambda: _described(
        request, facts, ranks.size, until_end, crew))
    run, dataset = Run(Path(folder)), Dataset(Path(file))
    # A rank of an elastic job comes here again when the ranks meet again.
    begins = crew is None or crew.job is None
    if begins:
        pulse.attend(run)
    if ranks.rank == 0 and not (crew and crew.leads):
        until_end.enter_context(limit.watching(stop))
    if crew:
        crew.leads = ranks.rank == 0
    if begins:
        console.note(f"{run.folder}: {request.recipe.name} on {file}, {_plural(ranks.size, 'process', 'processes')} "
                     f"with {_plural(threads, 'thread', 'threads')}, {policy}: {facts['precision_reason']}")
    request = dataclasses.replace(request, recipe=fitted(request.recipe, dataset))
    try:
        augment, final_augment = (function and partial(function, recipe=request.recipe)
                                  for function in (request.augment, request.final_augment))
        job = crew.job if not begins else training.Job(
            request.recipe, run, dataset, ranks, request.build_model, augment, request.adapt, stop,
            request.tensorboard, final_augment, describe=lambda: _describe(run, request, dataset, facts),
            profiler=request.profile and profiling.Profiler(
                request.profile, run.profile, ranks, request.recipe, threads),
            energy=energy.JobMeter(ranks, request.power_file) if request.energy else None,
            autotune_log=autotune_log, cadence=request.cadence, limit=limit, pulse=pulse, crew=crew,
            until_epoch=request.until_epoch)
        job.replicas = replicas.Replicas(ranks, request.tensor_parallel)
        if crew:
            crew.job = job
        result = training.train(job, resume=resume)
    except Exception as error:
        if is_aftermath(error) or crew and crew.goes_on(error):
            raise
        code = error.exit_code if isinstance(error, HpcaiError) else 1
        # What fails on all ranks alike is rank 0's to record.
        if code != EXIT_STOPPED and (ranks.rank == 0 or not getattr(error, "collective", False)):
            run.record_failure(rank=ranks.rank, error=error, exit_code=code)
        if isinstance(error, HpcaiError) and error.collective:
            elastic.part(ranks)
        raise
    elastic.part(ranks)
    return result


def _described(request: Request, facts: dict, size: int, until_end: contextlib.ExitStack, crew) -> list:
    """Prepare the run, which is locked until the end, and describe it in its folder, before any other rank can have
    something to write there; return the folder, the data and whether there is something to go on from."""
    if crew and crew.job:
        if not crew.leads:
            # The rank that held it is gone.
            until_end.enter_context(run_lock.held(crew.job.run.folder, patience=_ENDING_SECONDS))
        return [str(crew.job.run.folder), str(crew.job.dataset.path), False]
    if crew and launch.STARTED_VARIABLE in os.environ and request.output and Run(request.output).recipe_file.is_file():
        # All ranks that had begun it are gone.
        request = dataclasses.replace(request, resume=request.output, output=None)
    run, file = prepare(request, size=size)
    # What started these ranks has looked already, and the ranks before them may be just ending.
    patience = _ENDING_SECONDS if os.environ.get(launch.STARTED_VARIABLE) else 0
    until_end.enter_context(run_lock.held(run.folder, patience=patience))
    run.failure_file.unlink(missing_ok=True)
    dataset = Dataset(file)
    fresh = dataclasses.replace(request, recipe=fitted(request.recipe, dataset))
    resume = request.resume is not None and checkpoint.exists(run.checkpoints)
    if request.resume:
        manifest, before = run.manifest(), run.recipe()
        if not resume:
            if manifest.get("data_fingerprint") != dataset.fingerprint:
                raise DataError("the dataset file is not the one that the run began with", received=dataset.fingerprint,
                                expected=f"fingerprint {str(manifest.get('data_fingerprint'))[:12]}")
            console.note(f"{run.folder} has no checkpoint yet: it begins from the start")
        else:
            for sentence in continuation.what_follows(before, fresh.recipe, manifest, facts, _versions()):
                console.note(sentence)
    if not resume:
        _describe(run, fresh, dataset, facts)
    return [str(run.folder), str(file), resume]


def _copy(run: Run, made: Run) -> None:
    """Begin another run with what one has so far; it stays as it is.

    Raises:
        DataError: its checkpoints don't verify.
    """
    with made.copying():
        if checkpoint.exists(run.checkpoints):
            state, passed = checkpoint.newest(run.checkpoints)
            for reason in passed:
                console.note(f"passed over: {reason}")
            checkpoint.copy(run.checkpoints, made.checkpoints, state)
        write_json(made.manifest_file, run.manifest() | {"resumed_from": str(run.folder.absolute())})
        write_json(made.recipe_file, run.recipe().to_json())


def fitted(recipe: Recipe, dataset: Dataset) -> Recipe:
    """Return the recipe with what it leaves to the data, after checking that its decisions can be taken on them.

    Raises:
        DataError: the data don't fit the recipe.
        UsageError: the recipe decides by a figure that its task doesn't have.
    """
    recipe = check_fits(dataset, recipe)
    binary, validated = recipe.num_classes == 2, "validation" in dataset.splits
    problems = []
    if recipe.task == "regression" and (recipe.best_by != "loss" or recipe.class_weights != "none"):
        problems.append("a regression has loss to be best_by, and no class_weights")
    if not binary and (recipe.best_by == "roc_auc" or recipe.decision_threshold != "half"):
        problems.append("best_by=roc_auc and a decision_threshold need two classes")
    if not validated and recipe.decision_threshold != "half":
        problems.append("decision_threshold=f1 is chosen on a validation split, which the data lack")
    if validated and (recipe.best_by == "roc_auc" or recipe.decision_threshold != "half") and len(
            set(dataset.split("validation").labels.tolist())) < 2:
        problems.append("best_by=roc_auc and a decision_threshold need both classes in the validation split")
    if problems:
        raise UsageError(f"recipe {recipe.name} decides by what it does not have: {'; '.join(problems)}",
                         mend="change it with --set, or write the data again with --validation-fraction")
    return recipe


def _check_profile(asked: tuple[int, int], recipe: Recipe, dataset: Dataset, size: int) -> None:
    """Check that the training has the steps that are to be profiled.

    Raises:
        UsageError: it is shorter, or a timeline goes elsewhere already.
    """
    batch = recipe.batch_size * recipe.accumulation_steps * size
    steps = recipe.epochs * -(-len(dataset.split("train")) // batch)
    if asked[0] > steps:
        raise UsageError(f"the training has {steps:,} steps", expected="steps of it to profile",
                         mend="give earlier ones, as in `--profile 20-40`", received=f"{asked[0]}-{asked[1]}")
    if os.environ.get("HOROVOD_TIMELINE", "DYNAMIC") != "DYNAMIC":
        raise UsageError("HOROVOD_TIMELINE sends the timeline elsewhere", expected="no such variable with --profile",
                         mend="unset it", received=os.environ["HOROVOD_TIMELINE"])


def _plural(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def data_of(request: Request) -> Path:
    """Return the file that was asked for, else data/RECIPE.h5 where it is, else the built-in sample, and say so."""
    if request.data:
        return request.data
    name = request.data_recipe.name
    file = Path("data") / f"{name}.h5"
    if file.exists():
        return file
    if request.sample is None:
        raise UsageError(f"{file} does not exist and recipe {name} has no built-in sample",
                         expected="--data FILE.h5", mend=f"run `hpcai preprocess {name}`")
    # Named by its code too: people change the sample of a recipe of their own, and two files may have one name.
    # Only here: archives, downloads and what reads them would take every start a tenth of a second more.
    from hpcai_cli.engine.raw.preprocessing import Wishes, preprocess, reader_digest

    sample = cache_folder() / "samples" / f"{name}-{reader_digest(request.sample)}.h5"
    console.note(f"no --data and no {file}: training on the built-in sample; `hpcai preprocess {name}` brings the "
                 "whole data")

    def write(force: bool) -> None:
        preprocess(request.data_recipe, load=None, sample=request.sample, downloads=None, source="sample",
                   output=sample, wishes=Wishes(force=force))

    try:
        write(force=False)
    except UsageError:
        # The cache is ours: what another version of the recipe left there is replaced.
        write(force=True)
    return sample


def _describe(run: Run, request: Request, dataset: Dataset, facts: dict) -> None:
    """Write recipe.json, the whole truth of what is trained, and manifest.json, of where and with what."""
    came_from = run.manifest().get("resumed_from") if run.manifest_file.is_file() else None
    write_json(run.manifest_file, {
        "command": shlex.join(["hpcai", *sys.argv[1:]]), "recipe_reference": request.reference,
        "data": os.environ.get(launch.STAGED_VARIABLE) or os.path.abspath(dataset.path),
        "data_fingerprint": dataset.fingerprint,
        "class_names": list(dataset.class_names), "data_details": _columns(dataset),
        "seed": request.recipe.seed, **facts,
        "host": socket.gethostname(), "python": platform.python_version(), "git_commit": _git_commit(),
        "versions": _versions(), **({"resumed_from": came_from} if came_from else {})})
    # The last of what makes a run: what a kill leaves before it is no run yet, and its folder can be taken again.
    write_json(run.recipe_file, request.recipe.to_json())


def _columns(dataset: Dataset) -> dict:
    """Return how the file's columns came about, so that `predict` can bring new rows to the same form."""
    return {name: dataset.details[name] for name in ("columns", "features", "header", "label", "names")
            if name in dataset.details}


def _versions() -> dict[str, str | None]:
    return {name: _version(name) for name in ("hpcai", "tensorflow", "keras", "horovod", "h5py", "numpy")}


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
