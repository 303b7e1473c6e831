"""What `--search` takes, by the recipe's own types and limits."""

import pytest

from hpcai_cli.errors import UsageError
from hpcai_cli.recipe import Recipe
from hpcai_cli.search_space import Parameter, as_text, grid, parse

RECIPE = Recipe(name="tiny", summary="", options={"width": 8, "dropout": 0.1, "kind": "plain"})


def test_ranges_and_choices_take_the_type_of_their_field():
    found = parse({"learning-rate": "log:1e-4:1e-1", "batch_size": "32,64,128", "width": "4:16", "dropout": "0:0.6",
                   "kind": "plain,deep", "epochs": "log:1:64"}, RECIPE)
    assert found == (
        Parameter("batch_size", "32,64,128", "choice", choices=("32", "64", "128")),
        Parameter("dropout", "0:0.6", "float", 0.0, 0.6), Parameter("epochs", "log:1:64", "int", 1, 64, True),
        Parameter("kind", "plain,deep", "choice", choices=("plain", "deep")),
        Parameter("learning_rate", "log:1e-4:1e-1", "float", 1e-4, 0.1, True), Parameter("width", "4:16", "int", 4, 16))


@pytest.mark.parametrize(("name", "text", "words"), [
    ("learning_rat", "log:1:2", "perhaps 'learning_rate'"), ("learning_rate", "1e-1:1e-4", "LOW below HIGH"),
    ("learning_rate", "log:0:1", "both above 0"), ("learning_rate", "a:b", "NAME=LOW:HIGH"),
    ("learning_rate", "1:2:3", "NAME=LOW:HIGH"), ("learning_rate", "log:1", "NAME=LOW:HIGH"),
    ("learning_rate", "nan:1", "LOW below HIGH"), ("learning_rate", "0:inf", "LOW below HIGH"),
    ("learning_rate", "-1:1", "learning_rate"), ("batch_size", "32,,64", "different values"),
    ("batch_size", "32,32", "different values"), ("batch_size", "32,many", "cannot set batch_size"),
    ("batch_size", "1.5:3", "NAME=LOW:HIGH"), ("batch_size", "0:3", "batch_size"), ("kind", "0:3", "has no range"),
    ("optimizer", "adam,adom", "optimizer"), ("sync_batch_norm", "0:1", "has no range"), ("name", "a,b", "no field"),
    ("search", "a,b", "no field"), ("presets", "a,b", "no field")])
def test_what_cannot_be_searched_is_told(name, text, words):
    with pytest.raises(UsageError) as caught:
        parse({name: text}, RECIPE)
    assert words in str(caught.value)


def test_all_that_is_wrong_is_told_at_once():
    with pytest.raises(UsageError) as caught:
        parse({"wide": "1:2", "batch_size": "3:1"}, RECIPE)
    assert "'wide'" in str(caught.value) and "3:1" in str(caught.value)


def test_a_grid_is_every_combination():
    assert grid(parse({"kind": "plain,deep", "width": "4:5"}, RECIPE)) == [
        {"kind": "plain", "width": 4}, {"kind": "plain", "width": 5}, {"kind": "deep", "width": 4},
        {"kind": "deep", "width": 5}]


@pytest.mark.parametrize(("pairs", "words"), [
    ({"learning_rate": "log:1e-4:1e-1"}, "can be counted"), ({"width": "log:4:16"}, "can be counted"),
    ({"seed": "0:100000"}, "can be counted"), ({"width": "1:200", "epochs": "1:200"}, "40,000 points")])
def test_a_grid_that_is_none(pairs, words):
    with pytest.raises(UsageError, match=words):
        grid(parse(pairs, RECIPE))


@pytest.mark.parametrize("value", [0.1, 1e-4, 3.3333333333333335e-05, 7, "plain"])
def test_a_value_is_read_again_as_it_was(value):
    name = {float: "dropout", int: "width", str: "kind"}[type(value)]
    assert RECIPE.override({name: as_text(value)}).options[name] == value
