"""hpcai recipes: list, show, copy, validate."""

import json
import re
from pathlib import Path

import pytest

from hpcai_cli import catalog

WOOL = '''"""Sheep and goats."""

from hpcai_cli.recipe import Recipe

recipe = Recipe(name="wool", summary="sheep and goats", input_shape=(4,), num_classes=2, inputs="features",
                options={"units": 3})


def load(source, recipe):
    return {}


def sample():
    import numpy as np

    return {"train": (np.zeros((6, 4), "float32"), np.array([0, 1] * 3)),
            "test": (np.zeros((2, 4), "float32"), np.array([0, 1]))}


def build_model(recipe):
    import keras

    return keras.Sequential([keras.Input(recipe.input_shape), keras.layers.Dense(recipe.num_classes)])
'''


@pytest.fixture
def wool():
    """Return a function that writes a recipe of one's own, with something changed."""
    def write(old: str = "", new: str = "") -> Path:
        assert old in WOOL
        Path("wool.py").write_text(WOOL.replace(old, new) if old else WOOL)
        return Path("wool.py")
    return write


# ---- list and show -------------------------------------------------------------------------------------------------

def test_the_list_is_one_line_for_each_recipe(hpcai):
    done = hpcai("recipes", "list")
    assert done.exit_code == 0 and done.stderr == ""
    assert [line.split()[0] for line in done.stdout.splitlines()] == catalog.names()
    assert re.search("^mnist-mlp +handwritten digits, multi-layer perceptron$", done.stdout, re.M)
    document = json.loads(hpcai("recipes", "list", "--json").stdout)
    assert document["schema"] == "hpcai.recipes/1" and document["command"] == "recipes list"
    assert [recipe["name"] for recipe in document["recipes"]] == catalog.names()


def test_a_recipe_is_shown_with_every_field_and_its_help(hpcai, wool):
    done = hpcai("recipes", "show", f"./{wool()}")
    lines = done.stdout.splitlines()
    assert lines[0] == "Sheep and goats."
    assert lines[lines.index("  units = 3") + 1] == "      an option of this recipe's model"
    assert lines[lines.index("  batch_size = 32") + 1] == "      Examples per process and gradient."
    assert "  input_shape = [4]" in lines
    assert not [line for line in lines if line.startswith(("  name =", "  options ="))]


@pytest.mark.parametrize("verb", ["show", "validate", "copy"])
def test_an_unknown_recipe(hpcai, verb):
    done = hpcai("recipes", verb, "mnits", *(["new.py"] if verb == "copy" else []))
    assert done.exit_code == 2
    assert "did you mean `mnist`?" in done.stderr
    assert not list(Path(".").iterdir())


# ---- copy ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("target", ["my_digits.py", "deep/er/my_digits.py", "/"])
def test_a_copy_is_named_as_its_file_and_can_be_validated_as_told(hpcai, target, tmp_path):
    target = str(tmp_path / "my_digits.py") if target == "/" else target
    done = hpcai("recipes", "copy", "mnist", target)
    assert done.stdout == f"{target} written; next: hpcai recipes validate {target}\n"
    entry = catalog.find(target)
    assert entry.recipe.name == "my-digits"
    assert entry.recipe.options == catalog.find("mnist").recipe.options
    assert hpcai("preprocess", target, "--source", "sample").exit_code == 0
    assert Path("data/my-digits.h5").is_file()


def test_a_copy_replaces_nothing(hpcai):
    Path("mine.py").write_text("keep")
    done = hpcai("recipes", "copy", "mnist", "mine.py")
    assert done.exit_code == 2
    assert done.stderr == "error: the target exists; expected a new file; received: 'mine.py'\n"
    assert Path("mine.py").read_text() == "keep"


@pytest.mark.parametrize("target", ["mine", "mine.txt", "my-digits.py", "3.py", "folder"])
def test_a_copy_needs_the_name_of_a_module(hpcai, target):
    Path("folder").mkdir()
    done = hpcai("recipes", "copy", "mnist", target)
    assert done.exit_code == 2
    assert "expected a name such as mine.py" in done.stderr
    assert [path.name for path in Path(".").iterdir()] == ["folder"]


def test_a_copy_to_a_place_that_cannot_be_written(hpcai):
    Path("file").write_text("")
    done = hpcai("recipes", "copy", "mnist", "file/mine.py")
    assert done.exit_code == 1
    assert done.stderr.startswith("error: cannot write file/mine.py: ")


# ---- validate ------------------------------------------------------------------------------------------------------

def test_a_valid_recipe(hpcai, wool):
    done = hpcai("recipes", "validate", f"./{wool()}")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == "wool is valid: 10 parameters, 8 examples in its sample\n"
    document = json.loads(hpcai("recipes", "validate", "./wool.py", "--json").stdout)
    assert document["metrics"] == {"parameters": 10, "sample_examples": 8}


def test_a_valid_recipe_without_a_sample(hpcai, wool):
    assert hpcai("recipes", "validate", f"./{wool('def sample', 'def other')}").stdout == (
        "wool is valid: 10 parameters, no built-in sample\n")


@pytest.mark.parametrize(("old", "new", "code", "words"), [
    ("    import keras\n", "    raise KeyError('layers')\n", 2, "build_model fails; expected a Keras model; received: "
                                                              "\"KeyError: 'layers'\""),
    ("    import keras\n", "    return 3\n", 2, "build_model gives no model; expected a keras.Model; received: 'int'"),
    ("recipe.num_classes)", "5)", 2, "outputs of another shape; expected (2,) or (1,), one logit per class"),
    ("keras.Input(recipe.input_shape)", "keras.Input((7,))", 2, "does not take its input_shape (4,)"),
    (", keras.layers.Dense(recipe.num_classes)", ", keras.layers.Reshape((2, 2)), keras.layers.GlobalMaxPooling1D()", 2,
     "nothing to train"),
    ("    import numpy as np\n", "    return {}[0]\n", 2, "recipe ./wool.py: sample fails; received: 'KeyError: 0'"),
    ("(6, 4)", "(6, 5)", 3, "train has examples of shape (5,) where the recipe has (4,)"),
    ("np.array([0, 1])", "np.array([0, 2])", 3, "test has labels from 0 to 2 where the recipe has 2 classes"),
    ('"float32"), np.array([0, 1] * 3)', '"float64"), np.array([0, 1])', 3, "type float64"),
    ('{"train":', '{"learn":', 2, "gives no training split"), ('"test":', '"exam":', 3, "'exam' is no split")])
def test_what_is_wrong_is_said(hpcai, wool, old, new, code, words):
    done = hpcai("recipes", "validate", f"./{wool(old, new)}")
    assert (done.exit_code, done.stdout) == (code, "")
    assert words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
