"""Every recipe, and every architecture that it offers, goes the whole way by the command line on its sample."""

import json
import math
from pathlib import Path

import h5py
import pytest
from PIL import Image

from hpcai_cli import catalog

FILES = sorted((Path(__file__).parents[2] / "recipes").glob("*.py"))
RECIPES = [path.stem.replace("_", "-") for path in FILES if path.stem != "__init__"]
SMALL = {"width": "8", "units": "16", "bins": "8", "image_size": "64"}
"""What makes a model fast enough for a test, where the recipe has such an option."""
OWN = {"dogs-vs-cats-transfer": {"width": "0.35", "weights": "none", "frozen": "true"}}
"""Where those would not do: that network comes in few widths, its weights from an address, and it learns slowly."""
SELDOM = ("image-folder", "dogs-vs-cats-transfer")
"""What takes half a minute each; their networks are built by other tests too."""
CASES = [pytest.param(name, chosen, marks=[pytest.mark.long] if number or name in SELDOM else []) for name in RECIPES
         for number, chosen in enumerate(catalog.find(name).recipe.presets.get("architecture", {"": {}}))]
"""Each recipe with each of its architectures; with the first one each day."""


def settings_of(name: str, architecture: str) -> list[str]:
    options = catalog.find(name).recipe.options
    values = {key: value for key, value in SMALL.items() if key in options} | OWN.get(name, {})
    values |= {"architecture": architecture} if architecture else {}
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


def question(name: str, manifest: dict) -> Path | None:
    """Write a picture of the test split, or a row with the training's columns; None where arrays were trained on."""
    with h5py.File("data.h5") as file:
        if "images" in file["test"]:
            picture = file["test/images"][0]
            Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save("question.png")
            return Path("question.png")
    columns = manifest["data_details"].get("columns")
    if not columns:
        return None
    cells = {column["name"]: column["categories"][0] if column["kind"] == "category" else column["fill"]
             for column in columns}
    Path("question.csv").write_text(",".join(cells) + "\n" + ",".join(map(str, cells.values())) + "\n")
    return Path("question.csv")


@pytest.mark.parametrize(("name", "architecture"), CASES, ids=lambda value: value)
def test_from_the_sample_to_an_answer(hpcai, name, architecture):
    def run(*words, code: int = 0):
        done = hpcai(*words)
        assert done.exit_code == code, done.stderr
        return done

    entry = catalog.find(name)
    run("preprocess", entry.data_source().recipe.name, "--source", "sample", "--output", "data.h5")
    result = json.loads(run("train", name, "--data", "data.h5", "--output", "run", "--epochs", 1, "--json",
                            *settings_of(name, architecture)).stdout)
    assert (result["recipe"], result["epochs"]) == (name, 1)
    recipe = json.loads(Path("run/recipe.json").read_text())
    assert recipe["input_shape"] and recipe["epochs"] == 1
    if architecture:
        assert recipe["options"]["architecture"] == architecture
        brought = entry.recipe.presets["architecture"][architecture]
        given = recipe | recipe["options"]
        assert {key: given[key] for key in brought.keys() - {"epochs"} - SMALL.keys()} == {
            key: value for key, value in brought.items() if key != "epochs" and key not in SMALL}

    document = json.loads(run("evaluate", "run", "--json").stdout)
    kinds = {"classification": {"loss", "accuracy"}, "regression": {"loss", "r2"}}[recipe["task"]]
    assert kinds <= document["metrics"].keys()
    assert all(math.isfinite(value) for value in document["metrics"].values())
    for figure in kinds:
        assert document["metrics"][figure] == pytest.approx(result["metrics"][figure], rel=1e-5, abs=1e-6), figure

    asked = question(name, json.loads(Path("run/manifest.json").read_text()))
    if asked is None:
        run("predict", "run", "x.csv", code=2)
    else:
        answer, = map(json.loads, run("predict", "run", asked, "--json").stdout.splitlines())
        assert answer.get("label") in recipe["class_names"] if recipe["class_names"] else math.isfinite(answer["value"])

    again = json.loads(run("train", "--resume", "run", "--json").stdout)
    assert again["metrics"]["loss"] == result["metrics"]["loss"]
    more = json.loads(run("train", "--resume", "run", "--epochs", 2, "--json").stdout)
    assert more["epochs"] == 2


@pytest.mark.parametrize("name", RECIPES)
def test_the_values_of_a_recipe_can_be_given_back(hpcai, name):
    """What `show` says, as a file for --from, is the recipe itself."""
    Path("recipe.json").write_text(json.dumps(json.loads(hpcai("recipes", "show", name, "--json").stdout)["recipe"]))
    done = hpcai("train", name, "--from", "recipe.json", "--data", "none.h5")
    assert done.exit_code == 3
    assert "none.h5" in done.stderr.splitlines()[-1]
