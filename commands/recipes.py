"""hpcai recipes: list, show, copy and validate recipes."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from hpcai_cli import catalog, console, options
from hpcai_cli.errors import HpcaiError, UsageError
from hpcai_cli.recipe import field_help
from hpcai_cli.run import write_bytes

recipes = typer.Typer(help="List, show, copy and validate recipes.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="RECIPE", help="A name from `hpcai recipes list`, or a recipe file.")]


@recipes.command("list")
def list_recipes(json: options.Json = False) -> None:
    """List the recipes that can be named.

    Examples:
        $ hpcai recipes list
    """
    found = []
    for name in catalog.names():
        try:
            found.append((name, catalog.find(name).recipe.summary))
        except HpcaiError as error:
            # One broken package of somebody else's must not hide all the others.
            console.note(f"left out: {error}")
    if json:
        console.result_json({"schema": "hpcai.recipes/1", "command": "recipes list",
                             "recipes": [{"name": name, "summary": summary} for name, summary in found]})
        return
    width = max(len(name) for name, _ in found)
    for name, summary in found:
        console.result(f"{name:<{width}}  {summary}")


@recipes.command()
def show(recipe: Name, json: options.Json = False) -> None:
    """Show what a recipe is for and every field that --set can change.

    Examples:
        $ hpcai recipes show mnist
    """
    entry = catalog.find(recipe)
    values = entry.recipe.to_json()
    if json:
        console.result_json({"schema": "hpcai.recipe/1", "command": "recipes show", "recipe": values,
                             "file": str(entry.path)})
        return
    console.result(entry.module.__doc__.strip() + "\n")
    for name, value in [*values.items(), *values["options"].items()]:
        if name not in ("name", "summary", "options", "presets"):
            help_text = field_help().get(name, "an option of this recipe's model")
            console.result(f"  {name} = {value}\n      {help_text}")


@recipes.command()
def copy(
    recipe: Name, target: Annotated[Path, typer.Argument(metavar="FILE.py", help="A new file.")],
) -> None:
    """Copy a recipe to a file of your own, to change and train with `hpcai train ./FILE.py`.

    Examples:
        $ hpcai recipes copy mnist mine.py
    """
    entry = catalog.find(recipe)
    if target.suffix != ".py" or not target.stem.isidentifier():
        raise UsageError("the target is no Python module", expected="a name such as mine.py", received=str(target))
    if target.exists():
        raise UsageError("the target exists", expected="a new file", received=str(target))
    name = target.stem.replace("_", "-")
    # A recipe is named as its file is.
    text = entry.path.read_text().replace(f'name="{entry.recipe.name}"', f'name="{name}"', 1)
    write_bytes(target, text.encode())
    console.result(f"{target} written; next: hpcai recipes validate {target}")


@recipes.command()
def validate(recipe: Name, json: options.Json = False) -> None:
    """Check a recipe whole: its file, its fields, its model on its built-in sample.

    Examples:
        $ hpcai recipes validate ./mine.py
    """
    entry = catalog.find(recipe)
    source = entry.data_source()
    with console.quiet():
        from hpcai_cli.engine import model
        from hpcai_cli.engine.raw import preprocessing

    chosen, examples = entry.recipe, 0
    if source.function("sample") is not None:
        try:
            splits, class_names, _ = preprocessing.read_splits(source.recipe, source.function("sample")())
        except HpcaiError:
            raise
        except Exception as error:
            raise UsageError(f"recipe {recipe}: sample fails", received=f"{type(error).__name__}: {error}") from error
        examples = sum(len(labels) for _, labels in splits.values())
        # What the recipe leaves to the data, the sample decides here.
        chosen = dataclasses.replace(chosen, input_shape=chosen.input_shape or splits["train"][0].shape[1:],
                                     num_classes=chosen.num_classes or len(class_names))
    built = model.build(chosen, entry.function("build_model"))
    if json:
        console.result_json({"schema": "hpcai.validate/1", "command": "recipes validate", "recipe": entry.recipe.name,
                             "metrics": {"parameters": built.count_params(), "sample_examples": examples}})
        return
    console.result(f"{entry.recipe.name} is valid: {built.count_params():,} parameters"
                   + (f", {examples:,} examples in its sample" if examples else ", no built-in sample"))
