"""How recipes are found, and what is said about one that is broken."""

import sys
from pathlib import Path

import pytest

from hpcai_cli import catalog
from hpcai_cli.errors import HpcaiError, MissingError, UsageError

RECIPE = '''"""Sheep and goats."""

from hpcai_cli.recipe import Recipe

recipe = Recipe(name="{name}", summary="sheep and goats", input_shape=(4,), num_classes=2, inputs="features"{more})


def load(source, recipe):
    return {answer!r}


def build_model(recipe):
    return None
'''


def write(path: Path, *, name: str = "", answer: object = 1, more: str = "") -> Path:
    """Write a recipe file that is complete unless a test takes something away from it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(RECIPE.format(name=name or path.stem.replace("_", "-"), answer=answer, more=more))
    return path


def change(path: Path, old: str, new: str) -> Path:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return path


def refused(reference: object, kind: type[HpcaiError] = UsageError) -> str:
    with pytest.raises(HpcaiError) as caught:
        catalog.find(str(reference))
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Return a function that installs a package, a module and its metadata, which offers it as a recipe."""
    def install(module: str, point: str, *, target: str = "") -> Path:
        site = tmp_path / "site"
        metadata = site / f"{module}-1.0.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[hpcai.recipes]\n{point} = {target or module}\n")
        monkeypatch.syspath_prepend(str(site))
        return write(site / f"{module}.py", name=point.replace("_", "-"))
    return install


# ---- Found ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("reference", ["mnist-mlp", "mnist_mlp"])
def test_a_built_in_recipe_is_found_by_its_name(reference):
    entry = catalog.find(reference)
    assert (entry.recipe.name, entry.reference, entry.path.name) == ("mnist-mlp", "mnist-mlp", "mnist_mlp.py")
    assert callable(entry.function("build_model"))
    assert entry.function("sample") is None


def test_the_data_of_a_recipe_may_be_another_recipes():
    assert catalog.find("mnist-mlp").data_source().recipe.name == "mnist"
    assert catalog.find("mnist").data_source().recipe.name == "mnist"


def test_a_file_is_found_again_from_anywhere(tmp_path, monkeypatch):
    write(tmp_path / "my_wool.py")
    monkeypatch.chdir(tmp_path)
    entry = catalog.find("./my_wool.py")
    assert entry.recipe.name == "my-wool"
    assert entry.reference == str(tmp_path / "my_wool.py")
    monkeypatch.chdir("/")
    assert catalog.find(entry.reference).path == tmp_path / "my_wool.py"


def test_two_files_of_one_name_stay_apart(tmp_path):
    first = catalog.find(str(write(tmp_path / "a/wool.py", answer="first")))
    second = catalog.find(str(write(tmp_path / "b/wool.py", answer="second")))
    assert (first.function("load")(None, None), second.function("load")(None, None)) == ("first", "second")


def test_a_file_called_like_a_built_in_recipe_is_itself(tmp_path):
    assert catalog.find(str(write(tmp_path / "mnist.py", answer="mine"))).function("load")(None, None) == "mine"
    assert catalog.find("mnist").recipe.summary.startswith("handwritten digits")


def test_a_recipe_imports_the_files_beside_it(tmp_path):
    (tmp_path / "flock_early.py").write_text("SIZE = 7")
    (tmp_path / "flock_late.py").write_text("SIZE = 8")
    path = change(write(tmp_path / "wool.py"), "return 1", "from flock_late import SIZE as late\n    return SIZE, late")
    entry = catalog.find(str(change(path, "recipe =", "from flock_early import SIZE\nrecipe =")))
    assert entry.function("load")(None, None) == (7, 8)
    assert sys.path[0] != str(tmp_path)


def test_an_installed_package_offers_a_recipe(installed, hpcai):
    path = installed("shepherd", "counting-sheep")
    entry = catalog.find("counting-sheep")
    assert (entry.recipe.name, entry.reference, entry.path) == ("counting-sheep", "counting-sheep", path)
    assert "counting-sheep" in catalog.names()
    assert "counting-sheep" in hpcai("recipes", "list").stdout


def test_an_entry_point_may_be_written_with_underscores(installed):
    installed("shepherd_two", "white_sheep")
    assert "white-sheep" in catalog.names()
    assert catalog.find("white_sheep").recipe.name == catalog.find("white-sheep").recipe.name == "white-sheep"


def test_a_broken_package_hides_no_other_recipe(installed, hpcai):
    change(installed("shepherd_three", "black-sheep"), "recipe = ", "other = ")
    assert "has no `recipe = Recipe(...)`" in refused("black-sheep")
    done = hpcai("recipes", "list")
    assert done.exit_code == 0
    assert "mnist-mlp" in done.stdout and "black-sheep" not in done.stdout
    assert done.stderr.startswith("left out: recipe black-sheep is not complete")


# ---- Not found -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("reference", "words"), [
    ("mnits", "did you mean `mnist`?; received: 'mnits'"), ("mnist.mlp", "did you mean `mnist-mlp`?"),
    ("zebra", "run `hpcai recipes list`"), ("", "one of cifar10"), ("none.py", "no such recipe file"),
    ("./none", "no such recipe file"), ("recipes/", "no such recipe file")])
def test_no_such_recipe(reference, words):
    assert words in refused(reference)


def test_a_name_with_a_file_of_that_name_beside(tmp_path, monkeypatch):
    write(tmp_path / "zebra.py")
    monkeypatch.chdir(tmp_path)
    assert "for the file beside you write `./zebra.py`" in refused("zebra")


def test_a_file_that_is_no_python(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: wool")
    assert "not a Python file; expected a recipe file that ends in .py" in refused(tmp_path / "recipe.yaml")


# ---- Broken --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("old", "new", "words"), [
    ("recipe = ", "recipe = 1 / 0\nother = ", "(wool.py, line 5); expected a Python module without side effects; "
                                              "received: 'ZeroDivisionError: division by zero'"),
    ("def load(source, recipe):", "def load(source, recipe:", "does not import (line 8)"),
    ("recipe = ", "raise SystemExit(0)\nrecipe = ", "does not import (wool.py, line 5)"),
    ("recipe = Recipe(", "recipe = dict(", "it has no `recipe = Recipe(...)`"),
    ('name="wool"', 'name="cotton"', "its name is 'cotton' where its file says 'wool'"),
    ('"""Sheep and goats."""', "", "it has no docstring"),
    ("def load", "def unload", "it lacks the function load(source: pathlib.Path, recipe)"),
    ("def build_model", "def built_model", "it lacks the function build_model(recipe) -> keras.Model"),
    ("num_classes=2", "num_classes=1", "num_classes is out of range; expected 2 or more, or 0; received: 1"),
    ("num_classes=2", "classes=2", "TypeError: Recipe.__init__() got an unexpected keyword argument 'classes'"),
    ('summary="sheep and goats", ', "", "missing 1 required positional argument: 'summary'")])
def test_what_is_wrong_with_a_recipe_is_said(tmp_path, old, new, words):
    assert words in refused(change(write(tmp_path / "wool.py"), old, new))


def test_all_that_a_recipe_lacks_is_said_at_once(tmp_path):
    (tmp_path / "wool.py").write_text("import os")
    text = refused(tmp_path / "wool.py")
    for words in ("no `recipe = ", "no docstring", "lacks the function load", "lacks the function build_model",
                  "run `hpcai recipes copy mnist FILE.py`", "wool.py"):
        assert words in text


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "wool.py").write_bytes(b"\xff\xfe\x00recipe")
    assert "does not import" in refused(tmp_path / "wool.py")


def test_a_package_that_is_missing_is_named(tmp_path):
    path = change(write(tmp_path / "wool.py"), "recipe = ", "import shears_and_spindles\nrecipe = ")
    assert "run `pip install shears_and_spindles`" in refused(path, MissingError)


def test_an_entry_point_to_nowhere(installed):
    installed("shepherd_four", "lost-sheep", target="shepherd_who_left")
    assert "`pip install shepherd_who_left`" in refused("lost-sheep", MissingError)


def test_a_dataset_of_an_unknown_recipe(tmp_path):
    path = change(write(tmp_path / "wool.py", more=', dataset="mnits"'), "def load", "def unload")
    with pytest.raises(UsageError, match="did you mean `mnist`"):
        catalog.find(str(path)).data_source()
