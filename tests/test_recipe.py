"""Recipe: what --set, --from and a recipe.json may say, and the sentence where they may not."""

import dataclasses
import json
import math

import pytest

from hpcai_cli.errors import DataError, UsageError
from hpcai_cli.recipe import Recipe, field_help, parse_assignments, read_values

RECIPE = Recipe(name="wool", summary="sheep and goats", input_shape=(8, 8, 3), num_classes=2,
                class_names=("sheep", "goat"), validation_fraction=0.1, epochs=3, batch_size=16, learning_rate=0.01,
                options={"width": 16, "dropout": 0.25, "bias": True, "body": "compact", "filters": (8, 16)})


def refused(assignments: dict[str, str]) -> str:
    with pytest.raises(UsageError) as caught:
        RECIPE.override(assignments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("key", "text", "value"), [
    ("epochs", "12", 12), ("epochs", "1_000", 1000), ("batch-size", "64", 64), ("learning_rate", "1e-2", 0.01),
    ("learning-rate", "1", 1.0), ("optimizer", "sgd", "sgd"), ("input_shape", "28,28,1", (28, 28, 1)),
    ("input_shape", "[4, 4]", (4, 4)), ("class_names", '["a", "b"]', ("a", "b")), ("precision", "float32", "float32")])
def test_a_field_is_set_in_its_own_type(key, text, value):
    changed = RECIPE.override({key: text})
    assert getattr(changed, key.replace("-", "_")) == value
    assert type(getattr(changed, key.replace("-", "_"))) is type(value)
    assert RECIPE.epochs == 3


@pytest.mark.parametrize(("key", "text", "value"), [
    ("width", "32", 32), ("dropout", "0", 0.0), ("bias", "no", False), ("bias", "True", True), ("body", "3", "3"),
    ("filters", "4,8,12", (4, 8, 12))])
def test_an_option_of_the_model_is_set_like_a_field(key, text, value):
    changed = RECIPE.override({key: text}).options[key]
    assert changed == value and type(changed) is type(value)
    assert RECIPE.options["width"] == 16


def test_fields_that_need_each_other_are_set_together():
    changed = RECIPE.override({"num_classes": "3", "class_names": "sheep,goat,llama"})
    assert changed.class_names == ("sheep", "goat", "llama")
    assert "class_names has 2 names; expected num_classes = 3" in refused({"num_classes": "3"})


@pytest.mark.parametrize(("key", "nearest"), [
    ("epoch", "epochs"), ("learning_rat", "learning_rate"), ("drop_out", "dropout"), ("filter", "filters")])
def test_an_unknown_key_names_the_nearest(key, nearest):
    text = refused({key: "1"})
    assert f"has no field {key!r}, perhaps {nearest!r}; run `hpcai recipes show wool`" in text


def test_an_unknown_key_with_nothing_near():
    assert "has no field 'zzzz'; run" in refused({"zzzz": "1"})


@pytest.mark.parametrize("key", ["name", "summary", "options"])
def test_what_makes_the_recipe_itself_cannot_be_set(key):
    assert f"{key} cannot be set" in refused({key: "x"})


def test_all_problems_are_listed_at_once():
    text = refused({"epochs": "0", "epoch": "3", "learning_rate": "fast", "dropout": "nan", "bias": "perhaps",
                    "optimizer": "adamm", "batch_size": "8"})
    assert text.count("; and ") == 5
    for words in ("epochs is out of range; expected at least 1; received: 0", "no field 'epoch'",
                  "cannot set learning_rate; expected a value like 0.01; received: 'fast'", "dropout is not a number",
                  "cannot set bias; expected true or false; received: 'perhaps'",
                  "optimizer is unknown; expected one of adam, adamw, sgd, lamb; received: 'adamm'"):
        assert words in text
    assert "batch_size" not in text


@pytest.mark.parametrize(("key", "text", "words"), [
    ("epochs", "0", "at least 1"), ("epochs", "-3", "at least 1"), ("num_classes", "1", "2 or more, or 0"),
    ("learning_rate", "0", "a number above 0.0"), ("validation_fraction", "0.6", "at most 0.5"),
    ("validation_fraction", "-0.1", "at least 0.0"), ("momentum", "1.5", "at most 1.0"),
    ("seed", str(2**32), f"at most {2**32 - 1}"), ("seed", "-1", "at least 0"), ("epochs", "1.5", "a value like 3"),
    ("epochs", "", "a value like 3"), ("input_shape", "0,3", "positive sizes"), ("input_shape", "a,3", "like 8"),
    ("learning_rate", "nan", "a finite number"), ("learning_rate", "inf", "a finite number"),
    ("weight_decay", "-inf", "a finite number"), ("dropout", "nan", "a finite number"),
    ("inputs", "text", "one of images, features")])
def test_a_value_out_of_range_says_the_range(key, text, words):
    message = refused({key: text})
    assert key in message and words in message


@pytest.mark.parametrize("change", [
    {"epochs": "3"}, {"epochs": True}, {"epochs": 3.0}, {"learning_rate": "0.1"}, {"class_names": "ab"},
    {"options": ["width"]}, {"options": {"epochs": 3}}, {"input_shape": (0, 8)}, {"input_shape": (8.0,)},
    {"optimizer": "momentum"}])
def test_a_recipe_file_cannot_hold_what_set_cannot(change):
    with pytest.raises(UsageError, match=next(iter(change))):
        dataclasses.replace(RECIPE, **change)


def test_an_integer_may_stand_for_a_float():
    assert dataclasses.replace(RECIPE, learning_rate=1).learning_rate == 1.0


def test_json_gives_the_same_recipe_back():
    document = json.loads(json.dumps(RECIPE.to_json()))
    again = Recipe.from_json(document, where="recipe.json")
    assert again.to_json() == document
    assert dataclasses.replace(again, options={}) == dataclasses.replace(RECIPE, options={})
    assert again.options == {**RECIPE.options, "filters": [8, 16]}


@pytest.mark.parametrize(("document", "words"), [
    ([], "expected a JSON object; received: 'list'"), ({}, "missing"), ({"name": "x"}, "missing"),
    ({**RECIPE.to_json(), "colour": 1, "age": 2}, "received: 'age, colour'"),
    ({**RECIPE.to_json(), "epochs": "3"}, "epochs has the wrong type"),
    ({**RECIPE.to_json(), "epochs": 0}, "epochs is out of range"),
    ({**RECIPE.to_json(), "options": None}, "options has the wrong type"),
    ({**RECIPE.to_json(), "options": {"dropout": math.inf}}, "dropout is not a number")])
def test_a_foreign_json_is_bad_data(document, words):
    with pytest.raises(DataError) as caught:
        Recipe.from_json(document, where="runs/a/recipe.json")
    assert str(caught.value).startswith("runs/a/recipe.json h")
    assert words in str(caught.value)


def test_values_of_a_recipe_json(tmp_path):
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(RECIPE.override({"epochs": "7", "width": "99"}).to_json()))
    values = read_values(file)
    assert "name" not in values and "summary" not in values
    changed = RECIPE.override(values)
    assert (changed.epochs, changed.options["width"], changed.options["bias"]) == (7, 99, True)
    assert changed.class_names == RECIPE.class_names


def test_values_of_a_toml_file(tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text("epochs = 9\nlearning_rate = 2e-3\noptimizer = 'sgd'\nclass_names = ['a', 'b']\n"
                    "[options]\nbias = false\n")
    changed = RECIPE.override(read_values(file))
    assert (changed.epochs, changed.learning_rate, changed.optimizer) == (9, 0.002, "sgd")
    assert changed.class_names == ("a", "b")
    assert changed.options["bias"] is False


@pytest.mark.parametrize(("name", "text", "words"), [
    ("a.toml", "epochs = nan", "epochs; expected"), ("a.toml", "epochs = 2020-01-01", "epochs; expected"),
    ("a.json", '{"epochs": null}', "epochs; expected"), ("a.json", '{"epochs": {"n": 3}}', "epochs; expected"),
    ("a.json", '{"learning_rate": NaN}', "finite"), ("a.json", '{"options": 3}', "options cannot be set")])
def test_values_of_a_file_are_checked_like_those_of_set(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    assert words in refused(read_values(tmp_path / name))


@pytest.mark.parametrize(("name", "content"), [
    ("a.json", b"epochs: 3"), ("a.json", b"[1]"), ("a.json", b"\xff\xfe"), ("a.toml", b"epochs = "), ("a.json", b"")])
def test_a_file_without_settings_is_bad_data(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"cannot read settings from .*{name}: .*expected a recipe.json or a TOML file"):
        read_values(tmp_path / name)


def test_a_settings_file_that_is_not_there_or_a_folder(tmp_path):
    with pytest.raises(DataError, match="--from does not exist"):
        read_values(tmp_path / "none.json")
    with pytest.raises(DataError, match="cannot read settings"):
        read_values(tmp_path)


def test_assignments_are_split_at_the_first_equals_sign():
    assert parse_assignments(["a=b=c", "d="]) == {"a": "b=c", "d": ""}
    with pytest.raises(UsageError, match="expected key=value; received: 'epochs, =3'"):
        parse_assignments(["epochs", "x=1", "=3"])


def test_every_field_has_a_help_line():
    help_lines = field_help()
    assert list(help_lines) == [entry.name for entry in dataclasses.fields(Recipe)]
    for name, line in help_lines.items():
        assert line.endswith(".") and "\n" not in line, name


# ---- What the data decide, mixup, tasks ----------------------------------------------------------------------------

def test_shape_and_classes_may_be_left_to_the_data():
    recipe = Recipe(name="open", summary="")
    assert (recipe.input_shape, recipe.num_classes, recipe.task) == ((), 0, "classification")
    assert recipe.override({"input_shape": "[]"}).input_shape == ()
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json())), where="x") == recipe
    assert recipe.override({"task": "regression"}).task == "regression"


@pytest.mark.parametrize(("key", "text", "words"), [
    ("mixup", "-0.1", "at least 0.0"), ("mixup", "11", "at most 10.0"), ("mixup", "nan", "a finite number"),
    ("task", "ranking", "one of classification, regression"), ("class_weights", "half", "one of none, balanced"),
    ("decision_threshold", "0.3", "one of half, f1"), ("best_by", "f2", "one of loss, accuracy, roc_auc"),
    ("task", "regression", "none for a regression")])
def test_a_wish_that_cannot_be_says_what_can(key, text, words):
    message = refused({key: text})
    assert (key in message or key == "task") and words in message


# ---- Presets -------------------------------------------------------------------------------------------------------

PRESETS = dataclasses.replace(RECIPE, presets={"body": {
    "compact": {}, "tutorial": {"epochs": 30, "optimizer": "sgd", "width": 64}, "large": {"width": 128}}})


def test_a_preset_brings_its_fields_and_options():
    changed = PRESETS.override({"body": "tutorial"})
    assert (changed.epochs, changed.optimizer, changed.options["width"]) == (30, "sgd", 64)
    assert (changed.batch_size, changed.options["dropout"]) == (RECIPE.batch_size, RECIPE.options["dropout"])
    assert (PRESETS.epochs, PRESETS.options["width"]) == (3, 16)
    assert PRESETS.override({"body": "compact"}).options["width"] == 16


@pytest.mark.parametrize("order", [("body", "epochs", "width"), ("width", "epochs", "body")])
def test_what_is_set_by_hand_wins_in_any_order(order):
    values = {"body": "tutorial", "epochs": "7", "width": "8"}
    changed = PRESETS.override({name: values[name] for name in order})
    assert (changed.epochs, changed.optimizer, changed.options["width"]) == (7, "sgd", 8)


@pytest.mark.parametrize("value", ["tutorials", "", "Tutorial"])
def test_an_unknown_preset_names_the_choices(value):
    with pytest.raises(UsageError, match=f"^body is unknown; expected one of compact, tutorial, large; "
                                         f"received: {value!r}$"):
        PRESETS.override({"body": value})


def test_a_preset_comes_from_a_file_too(tmp_path):
    (tmp_path / "a.toml").write_text("body = 'tutorial'\nepochs = 5\n")
    changed = PRESETS.override(read_values(tmp_path / "a.toml"))
    assert (changed.epochs, changed.optimizer) == (5, "sgd")
    (tmp_path / "b.toml").write_text("[options]\nbody = 'tutorial'\n")
    assert PRESETS.override(read_values(tmp_path / "b.toml")).epochs == 30


def test_a_recipe_json_of_a_preset_gives_the_same_recipe(tmp_path):
    """All its values are set by hand, so that none of them is the preset's."""
    before = PRESETS.override({"body": "tutorial", "epochs": "4", "learning_rate": "0.5"})
    (tmp_path / "recipe.json").write_text(json.dumps(before.to_json()))
    assert PRESETS.override(read_values(tmp_path / "recipe.json")) == before
    assert Recipe.from_json(before.to_json(), where="x").override({"body": "large"}).options["width"] == 128


@pytest.mark.parametrize("presets", [
    {"body": {"compact": {}, "large": {"epoch": 3}}}, {"body": {"compact": {"epochs": "3"}}},
    {"body": {"compact": {"name": "other"}}}, {"body": {"compact": 3}}, {"body": ["compact"]}, {"bodies": {"a": {}}},
    {"body": {"compact": {"width": "wide"}}}])
def test_a_preset_that_would_do_nothing_or_harm_is_refused(presets):
    with pytest.raises(UsageError, match="body|bodies|epochs"):
        dataclasses.replace(RECIPE, presets=presets)
    with pytest.raises(DataError):
        Recipe.from_json({**RECIPE.to_json(), "presets": presets}, where="recipe.json")
