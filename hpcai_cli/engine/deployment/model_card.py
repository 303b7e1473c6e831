"""The card of an exported model: what it is, what it learned from, how well it answers, where its limits are."""

from collections.abc import Mapping

from hpcai_cli.errors import printable
from hpcai_cli.recipe import Recipe
from hpcai_cli.run import Run, read_json

_SHOWN = ("epochs", "batch_size", "optimizer", "learning_rate", "schedule", "weight_decay", "label_smoothing",
          "class_weights", "precision", "seed")
_MOST_CLASSES = 50
"""That are named; more are counted."""


def text(run: Run, recipe: Recipe, document: Mapping, parity: Mapping, cost: Mapping) -> str:
    """Return the card as Markdown, in the order of arXiv 1810.03993.

    Args:
        document: artefact.json of the export.
        parity: what `parity.compare` found.
        cost: `milliseconds` of a call by batch size, and `peak_memory_mb`.
    """
    parts = [f"# {document['name']}", _details(run, recipe, document), _data(run, recipe, document),
             _metrics(parity), _answering(document, cost), _limits(run, recipe, parity)]
    return "\n\n".join(parts) + "\n"


def _details(run: Run, recipe: Recipe, document: Mapping) -> str:
    manifest = run.manifest()
    lines = [f"{_said(recipe.summary)}. Trained by `{_said(manifest.get('command'))}` with hpcai "
             f"{document['hpcai']}, exported {document['made']}.", "", "| | |", "|---|---|",
             f"| recipe | {_said(recipe.name)} |", f"| file | {document['file']} ({document['kind']}) |",
             f"| inputs | {document['inputs']}, {' x '.join(map(str, recipe.input_shape))}: "
             f"{document['preprocessing']} |", f"| answers | {_answers(recipe)} |"]
    step = manifest.get("compression_step")
    if isinstance(step, dict):
        lines.append(f"| compressed | {_said(' '.join(str(value) for value in step.values() if value))} |")
    values = recipe.to_json()
    lines += [f"| {name} | {_said(values[name])} |" for name in _SHOWN if name in values]
    lines += [f"| {_said(name)} | {_said(value)} |" for name, value in recipe.options.items()]
    return "\n".join(lines)


def _answers(recipe: Recipe) -> str:
    if recipe.task == "regression":
        return "a number"
    names = ", ".join(map(_said, recipe.class_names[:_MOST_CLASSES]))
    more = len(recipe.class_names) - _MOST_CLASSES
    return f"{names} and {more} more" if more > 0 else names


def _data(run: Run, recipe: Recipe, document: Mapping) -> str:
    manifest = run.manifest()
    lines = ["## Data", "", f"File `{_said(manifest.get('data'))}`, fingerprint `{document['data_fingerprint']}`."]
    details = manifest.get("data_details") or {}
    if "columns" in details:
        lines += ["", "| column | kind | filled with, or categories |", "|---|---|---|"]
        lines += [f"| {_said(column['name'])} | {_said(column['kind'])} | "
                  f"{_said(', '.join(column['categories']) if 'categories' in column else column['fill'])} |"
                  for column in details["columns"]]
    return "\n".join(lines)


def _metrics(parity: Mapping) -> str:
    lines = ["## Metrics", "", f"On {parity['examples']:,} examples of the test split, which it never learned from; "
             "before and after the export.", "", "| figure | before | after |", "|---|---|---|"]
    lines += [f"| {name} | {values['before']:.6g} | {values['after']:.6g} |"
              for name, values in parity["metrics"].items()]
    lines += ["", f"Largest difference of an answer {parity['largest_difference']:.3g} (at most "
              f"{parity['tolerance']:g} is delivered); the same answer for {parity['agreement']:.2%}."]
    return "\n".join(lines)


def _answering(document: Mapping, cost: Mapping) -> str:
    lines = ["## Cost", "", "Where it was exported: milliseconds of a call with so many examples, and the peak memory "
             "of the process.", "", "| batch | milliseconds |", "|---|---|"]
    lines += [f"| {size} | {value:.3g} |" for size, value in cost["milliseconds"].items()]
    size = sum(said["bytes"] for said in document["files"].values())
    return "\n".join([*lines, "", f"Memory {cost['peak_memory_mb']:.0f} MB; files {size / 1e6:.2f} MB."])


def _limits(run: Run, recipe: Recipe, parity: Mapping) -> str:
    lines = ["## Limits", "", f"- The figures are of {parity['examples']:,} examples from the same source as the "
             "training's; for examples of another source there is none."]
    if recipe.task == "classification":
        lines.append("- It answers one of its classes for whatever it is given, also for what is none of them.")
    evaluated = run.evaluation / "metrics.json"
    if evaluated.is_file():
        classes = read_json(evaluated).get("classes")
        if isinstance(classes, list) and classes:
            worst = min(classes, key=lambda row: row.get("f1", 1))
            lines.append(f"- Weakest class: {_said(worst.get('name'))}, F1 {worst.get('f1', float('nan')):.3f}.")
    lines += ["- Who is judged by its answers, and what a wrong one costs, its data do not tell: whoever deploys it "
              "must.", "- Watch it with `hpcai deploy monitor`: a model does not notice that its inputs have changed."]
    return "\n".join(lines)


def _said(value: object) -> str:
    """Return a value as it can stand in a table of Markdown, whoever wrote it."""
    return printable(str(value)).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
