"""hpcai train: a recipe and a dataset file to a trained run."""

import re
import time
from pathlib import Path
from typing import Annotated

import typer

from hpcai_cli import catalog, console, durations, launch, options, rank_processes, run_lock, supervisor
from hpcai_cli.cadence import Cadence
from hpcai_cli.errors import MissingError, UsageError
from hpcai_cli.launchers import Ranks
from hpcai_cli.pulse import Pulse
from hpcai_cli.recipe import Recipe, parse_assignments, read_values
from hpcai_cli.run import Run
from hpcai_cli.signals import StopRequest

PROFILED = 1_000
"""Steps that can be profiled at most: a trace holds every operation of each."""


@options.flattened
def train(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="A name from `hpcai recipes list`, or a recipe "
                                                 "file.")] = None,
    data: options.Data = None,
    np: options.Processes = None,
    where: options.Where = options.HERE,
    survival: options.Survival = options.MORTAL,
    output: Annotated[Path | None, typer.Option(metavar="RUN", help="The run's folder; runs/RECIPE-N by "
                                                "default.")] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Continue a run from its newest "
                                                "checkpoint, with --output in another folder.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Short for --set epochs=N.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Short for --set batch_size=N, per process.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Short for --set learning_rate=X.")] = None,
    precision: Annotated[str | None, typer.Option(help="Short for --set precision=auto|float32|mixed_bfloat16|"
                                                  "mixed_float16.")] = None,
    seed: Annotated[int | None, typer.Option(help="Short for --set seed=N.")] = None,
    settings: options.Set = None,
    from_file: options.From = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard's event files too.")] = False,
    profile: Annotated[str | None, typer.Option(metavar="FIRST-LAST", help="Trace these steps into RUN/profile, and "
                                                "say where their time goes.")] = None,
    tensor_parallel: Annotated[int, typer.Option(min=1, metavar="T", help="Processes that share a model: each holds a "
                                                 "part of its wide dense layers.")] = 1,
    prove: Annotated[bool, typer.Option("--prove", help="Show instead, in a few steps, that these processes train as "
                                        "one with batches as large as all of theirs.")] = False,
    checkpoint_every: Annotated[list[str] | None, typer.Option(
        metavar="N", help="How often a checkpoint is written beside the training: 500steps, 30s, 10m or 2epochs; "
        "repeatable. At the end of each epoch, and every 10 minutes in a long one, by default.")] = None,
    keep_checkpoints: Annotated[int, typer.Option(min=1, metavar="K", help="Newest checkpoints that stay, besides the "
                                                  "best.")] = 2,
    max_time: Annotated[str | None, typer.Option(metavar="TIME", help="Save and end with exit code 75 before so much "
                                                 "time has passed, such as 90m or 2h; under Slurm its limit counts "
                                                 "too.")] = None,
    until_epoch: Annotated[int | None, typer.Option(min=1, metavar="N", help="Save and end with exit code 75 after "
                                                    "this epoch, to be resumed later.")] = None,
    fusion: options.Fusion = options.UNFUSED,
    supervision: options.Supervision = options.SUPERVISED,
    energy: options.Energy = False,
    power_file: options.PowerFile = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Train a recipe, alone or in several processes, and evaluate the best epoch on the test split.

    Ctrl-C, SIGTERM and SIGUSR1 end in a checkpoint and exit code 75; --resume goes on from there. Of several processes
    one that dies or hangs is found, and the job goes on from its newest checkpoint by itself.

    Examples:
        $ hpcai train mnist
        $ hpcai train mnist --data data/mnist.h5 --np 2 --json
        $ hpcai train mnist --set architecture=tutorial --epochs 3 --batch-size 32
        $ hpcai train ./mine.py --data mine.h5 --output runs/first
        $ hpcai train --resume runs/first
        $ hpcai train --resume runs/first --output runs/longer --epochs 20
        $ hpcai train mnist --checkpoint-every 30s --max-time 2h
        $ hpcai train mnist-mlp --np 2 --tensor-parallel 2
        $ hpcai train mnist --np 2 --profile 100-120
        $ hpcai train mnist --energy
        $ hpcai train mnist --np 2 --prove
        $ hpcai train mnist --np 2 --autotune
        $ hpcai train mnist --data data/mnist.h5 --hosts a:4,b:4
        $ hpcai train mnist --elastic --np 4
        $ hpcai train mnist --elastic --min-np 2 --max-np 16 --discovery ./hosts.sh
        $ hpcai train mnist --np 2 --heartbeat 60 --max-restarts 10
        $ horovodrun -np 2 hpcai train mnist --data data/mnist.h5

    Next: hpcai evaluate RUN
    """
    short = {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate, "precision": precision,
             "seed": seed}
    assignments = {**(read_values(from_file) if from_file else {}), **parse_assignments(settings or []),
                   **{name: str(value) for name, value in short.items() if value is not None}}
    fractions = [name for name in ("test_fraction", "validation_fraction") for pair in settings or []
                 if pair.replace("-", "_").startswith(f"{name}=")]
    if fractions:
        raise UsageError(f"{fractions[0]} decides what is in the data file, and train only reads it",
                         mend="give it to `hpcai preprocess`")
    steps = _steps(profile) if profile is not None else None
    cadence = Cadence.of(checkpoint_every, keep_checkpoints) if checkpoint_every else Cadence(keep=keep_checkpoints)
    seconds = durations.seconds(max_time, what="--max-time") if max_time is not None else None
    entry, chosen = _entry_and_recipe(recipe, resume, assignments)
    if tensorboard and launch.missing_package("tensorboard"):
        raise MissingError("--tensorboard needs a package that is not installed",
                           mend="run `pip install 'hpcai[tensorboard]'`", received="tensorboard")
    ranks = _supervised(survival.ranks(np, where), supervision)
    if ranks and ranks.elastic or launch.is_elastic():
        _check_elastic({"--autotune": fusion.autotune, "--tensor-parallel": tensor_parallel > 1, "--profile": profile,
                        "--prove": prove, "--energy": energy, "--power-file": power_file}, chosen)
    if fusion != options.UNFUSED and not (ranks and ranks.launcher) and launch.place().size == 1:
        raise UsageError("a single process sends no gradients", expected="--fusion-mb, --cycle-ms and --autotune with "
                         "--np N, --hosts or a launcher")
    fusion.apply()

    with console.quiet():
        from hpcai_cli.engine import job

    source = entry.data_source()
    functions = map(entry.function, ("build_model", "augment", "final_augment", "adapt"))
    request = job.Request(chosen, entry.reference, *functions, source.recipe, source.function("sample"), data, output,
                          resume, tensorboard, steps, energy or power_file is not None, power_file, tensor_parallel,
                          cadence, seconds, until_epoch)
    if prove:
        if supervision.max_restarts:
            raise UsageError("--prove trains a few steps only", expected="no --max-restarts with it")
        _prove(ranks, request, assignments, json)
        return
    if ranks:
        _start_ranks(ranks, job.prepare(request, size=ranks.np), request, assignments, json, supervision)
        return
    with StopRequest() as stop, Pulse(supervision.heartbeat) as pulse:
        launch.announce()
        result = job.run_here(request, stop, pulse)
    if json:
        console.result_json(result)
        return
    console.table(f"{result['run']}: {result['epochs']} epochs, {result['steps']:,} steps, world size "
                  f"{result['world_size']}", ("metric", "value"), list(result["metrics"].items()))
    _show_measured(result)
    console.result(f"next: hpcai evaluate {result['run']}")


def _check_elastic(given: dict[str, object], recipe: Recipe) -> None:
    """Refuse what needs the same processes from the first step to the last."""
    if named := [option for option, value in given.items() if value]:
        raise UsageError(f"{named[0]} needs the same processes from the first step to the last",
                         expected="it or --elastic, and not both")
    if recipe.gradient_reduction == "adasum":
        raise UsageError("Adasum combines the gradients of a power of two of processes", received="adasum",
                         expected="--set gradient_reduction=average with --elastic")


def _prove(ranks: Ranks | None, request, assignments: dict[str, str], json: bool) -> None:
    """Compare these processes with one, and print what came out."""
    given = {"--output": request.output, "--resume": request.resume, "--tensorboard": request.tensorboard,
             "--profile": request.profile, "--energy": request.energy,
             "--tensor-parallel": request.tensor_parallel > 1}
    if named := [option for option, value in given.items() if value]:
        raise UsageError("--prove trains a few steps and keeps nothing of them", expected=f"no {named[0]} with it")
    if ranks:
        arguments = ["train", request.reference, "--prove", *options.words({
            "--data": request.data, "--json": json, "--set": _settings(assignments)})]
        rank_processes.run_command(ranks, arguments, [request.data] if request.data else [])
        return
    launch.announce()
    with console.quiet():
        from hpcai_cli.engine import proof
    result = proof.prove_here(request)
    if json:
        console.result_json(result)
        return
    console.table(f"{result['recipe']}: {result['world_size']} processes with batches of {result['batch_size']}, and "
                  "one with all", ("step", "loss", "of one"),
                  [(number, *losses) for number, losses in enumerate(
                      zip(result["losses"], result["losses_of_one"], strict=True), 1)])
    console.result(f"the weights differ by {result['metrics']['largest_difference']:.1e} of what they have moved; "
                   f"compared with {', '.join(result['changed'])}")


def _show_measured(result: dict) -> None:
    """Print what --energy and --profile have found."""
    from hpcai_cli.engine import autotune, energy, profile_summary

    if "autotune" in result:
        console.result(autotune.words(result["autotune"]) + "\n")
    if "energy" in result:
        console.result(f"energy: {energy.words(result['energy'])}\n")
    if result.get("profile"):
        console.result(profile_summary.text(result["profile"]))
    elif "profile" in result:
        console.result(f"profile: none, since the training ended at step {result['steps']:,}, before it could begin\n")


def _steps(text: str) -> tuple[int, int]:
    """Return the first and the last step that are to be profiled."""
    match = re.fullmatch(r"([1-9]\d{0,11})-([1-9]\d{0,11})", text.strip())
    first, last = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 0 < first <= last < first + PROFILED:
        raise UsageError("--profile takes the first and the last step", received=text,
                         expected=f"FIRST-LAST with at most {PROFILED:,} steps, as in `--profile 100-120`")
    return first, last


def _entry_and_recipe(name: str | None, resume: Path | None,
                      assignments: dict[str, str]) -> tuple[catalog.CatalogEntry, Recipe]:
    if resume is not None:
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


def _supervised(ranks: Ranks | None, supervision: options.Supervision) -> Ranks | None:
    """Return the processes to start; one, where a single one is to be started again when it fails.

    Raises:
        UsageError: the heart would beat too fast, or somebody else has started the processes.
    """
    if 0 < supervision.heartbeat < 1:
        raise UsageError("--heartbeat is too short", expected="at least 1 second, or 0 for never",
                         received=supervision.heartbeat)
    here = launch.place()
    if supervision.max_restarts and here.size > 1:
        raise UsageError(f"--max-restarts starts processes again, but {here.launcher} has started these",
                         expected="processes that hpcai starts", mend=f"leave {here.launcher} out and give --np",
                         received=supervision.max_restarts)
    return ranks or (Ranks(1, launcher="") if supervision.max_restarts else None)


def _start_ranks(ranks: Ranks, prepared: tuple[Run, Path], request, assignments: dict[str, str], json: bool,
                 supervision: options.Supervision) -> None:
    """Start this same command in so many processes on the folder and the data that were checked."""
    run, file = prepared
    run_lock.check(run.folder)
    started = time.monotonic()

    def arguments(begin: str) -> list[str]:
        left = request.max_time and max(1.0, request.max_time - (time.monotonic() - started))
        return ["train", request.reference, "--data", str(file), begin, str(run.folder), *options.words({
            "--tensorboard": request.tensorboard, "--profile": "-".join(map(str, request.profile or ())),
            "--energy": request.energy, "--power-file": request.power_file,
            "--tensor-parallel": request.tensor_parallel if request.tensor_parallel > 1 else None,
            "--checkpoint-every": request.cadence.words(), "--keep-checkpoints": request.cadence.keep,
            "--max-time": left and f"{left:.3f}", "--until-epoch": request.until_epoch, "--json": json,
            "--set": _settings(assignments),
            "--heartbeat": supervision.heartbeat})]

    restarts = supervisor.RESTARTS if supervision.max_restarts is None else supervision.max_restarts
    code = supervisor.supervise(ranks, arguments, run, [file, run.folder], resumes=request.resume is not None,
                                heartbeat=supervision.heartbeat, max_restarts=restarts)
    if code:
        raise typer.Exit(code)


def _settings(assignments: dict[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in assignments.items()]
