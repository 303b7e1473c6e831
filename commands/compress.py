"""hpcai compress: a trained run to a smaller or faster model that keeps its promise."""

from pathlib import Path
from typing import Annotated

import typer

from hpcai_cli import catalog, console, launch, options, rank_processes
from hpcai_cli.errors import GateError, UsageError
from hpcai_cli.recipe import Recipe, parse_assignments
from hpcai_cli.run import Run
from hpcai_cli.signals import StopRequest


@options.flattened
def compress(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder from `hpcai train`.")],
    data: options.Data = None,
    distil: Annotated[str | None, typer.Option("--distill", "--distil", metavar="STUDENT", help="Train a student: the "
                      "name of a recipe, or options of the run's own, such as width=8.")] = None,
    prune: Annotated[float | None, typer.Option(metavar="SHARE", help="Share of the weights that goes to zero; with "
                     "--pattern filters, of the multiply-accumulates that goes.")] = None,
    pattern: Annotated[str, typer.Option(help="unstructured, 2:4 (two of each four weights), or filters (whole filters "
                                         "and units are removed).")] = "unstructured",
    quantize: Annotated[str | None, typer.Option(help="float16, dynamic or int8.")] = None,
    aware: Annotated[bool, typer.Option("--aware", help="Train under quantization before int8.")] = False,
    max_drop: Annotated[float | None, typer.Option(metavar="POINTS", help="By how much the accuracy may fall, as in "
                        "0.01; milder forms are tried until one holds, exit code 5 when none does.")] = None,
    target: Annotated[str | None, typer.Option(metavar="GOAL", help="size=200KB, latency=1ms or macs=50%: forms are "
                                               "tried from the mildest on.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Of each training; a share of the recipe's by default.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of each training at its start, likewise.")] = None,
    temperature: Annotated[float, typer.Option(help="By which the original's answers are softened, from which each "
                                               "training learns.")] = 4.0,
    alpha: Annotated[float, typer.Option(help="The original's share in the loss of each training; 0 for the labels "
                                         "alone.")] = 0.7,
    np: options.Processes = None,
    where: options.Where = options.HERE,
    force: Annotated[bool, typer.Option("--force", help="Replace what was made with other settings.")] = False,
    trust_model: options.TrustModel = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Make a trained model smaller and faster, measure it before and after, and hold a bound on the accuracy.

    The steps come in the order that works: distil, prune, train under quantization, convert. Each leaves a run
    folder below RUN/compressed, which evaluate and predict take like any run; what is there is not made again. In each
    training the model learns from the original run beside the labels.

    Examples:
        $ hpcai compress runs/mnist-1 --quantize int8 --max-drop 0.003
        $ hpcai compress runs/mnist-1 --prune 0.9
        $ hpcai compress runs/dogs-vs-cats-1 --prune 0.5 --pattern filters
        $ hpcai compress runs/cifar10-1 --distill width=16 --prune 0.5 --quantize int8 --aware
        $ hpcai compress runs/mnist-1 --target size=50KB --np 2

    Next: hpcai evaluate RUN/compressed/NAME
    """
    opened = Run.open(run)
    from hpcai_cli.engine.compression import plan

    asked = plan.Asked(distil or "", prune, pattern, quantize or "", aware, max_drop, plan.parse_target(target))
    plan.check(asked, epochs=epochs, learning_rate=learning_rate, temperature=temperature, alpha=alpha)
    launch.announce()
    if ranks := where.ranks(np):
        given = {"--data": data, "--distill": distil, "--prune": prune, "--pattern": pattern, "--quantize": quantize,
                 "--aware": aware, "--max-drop": max_drop, "--target": target, "--epochs": epochs,
                 "--learning-rate": learning_rate, "--temperature": temperature, "--alpha": alpha, "--force": force,
                 "--trust-model": trust_model, "--json": json}
        rank_processes.run_command(ranks, ["compress", str(run), *options.words(given)],
                                   list(filter(None, (run, data))))
        return
    entry = catalog.find(opened.recipe_reference())
    student, chosen = _student(distil, entry, opened.recipe())
    with console.quiet():
        from hpcai_cli.engine.compression.search import compress_run
    with StopRequest() as stop:
        report = compress_run(
            opened, asked, data=data, student=student, build_student=chosen.function("build_model"),
            student_reference=chosen.reference, temperature=temperature, alpha=alpha, epochs=epochs,
            learning_rate=learning_rate, force=force, trust=trust_model, stop=stop,
            functions={f"{whose}{name}": of.function(name) for whose, of in (("", entry), ("student_", chosen))
                       for name in ("augment", "final_augment")} | {"student_adapt": chosen.function("adapt")})
    if json:
        console.result_json(report)
    else:
        _print(report)
    if report["failed"]:
        error = GateError(report["failed"])
        error.collective = True
        raise error


def _student(asked: str | None, entry, recipe: Recipe) -> tuple[Recipe | None, catalog.CatalogEntry]:
    """Return the student's recipe and where its functions are."""
    if asked is None:
        return None, entry
    if "=" in asked:
        return recipe.override(parse_assignments(asked.split(","))), entry
    other = catalog.find(asked)
    if other.data_source().recipe.name != entry.data_source().recipe.name and (
            other.recipe.input_shape, other.recipe.num_classes) != (recipe.input_shape, recipe.num_classes):
        raise UsageError(f"recipe {asked} takes other examples than the run's",
                         expected=f"inputs {recipe.input_shape} and {recipe.num_classes} classes", received=asked)
    return other.recipe, other


def _print(report: dict) -> None:
    measure = report["measure"]
    console.table(f"{report['run']} on the {report['split']} split", (
        "form", measure, "95 %", "drop", "KB", "gzipped", "M MACs", "zeros", "ms", "ms, 32", "MB"),
        [(form["name"], form["metrics"][measure], "{:.4f}-{:.4f}".format(*form["interval"]), form["drop"],
          f"{form['bytes'] / 1e3:,.1f}", f"{form['bytes_gzipped'] / 1e3:,.1f}", f"{form['macs'] / 1e6:,.2f}",
          f"{form['sparsity']:.0%}", f"{form['latency_ms']['1']:.3f}", f"{form['latency_ms']['32']:.2f}",
          f"{form['peak_memory_mb']:,.0f}") for form in report["forms"]])
    for sentence in report["notes"]:
        console.result(sentence)
    if report["chosen"]:
        console.result(f"next: hpcai evaluate {report['chosen']}")
