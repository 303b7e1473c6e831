"""What is asked for becomes steps in the order that works, and the forms that are tried come in the order promised."""

import pytest

from hpcai_cli.engine.compression.plan import Asked, Step, Target, check, forms, name_of, parse_target
from hpcai_cli.errors import UsageError

FINE = {"epochs": None, "learning_rate": None, "temperature": 4.0, "alpha": 0.7}


def names(asked: Asked) -> list[str]:
    return [name_of(form) for form in forms(asked)]


def test_the_steps_come_in_the_order_that_works():
    asked = Asked(student="width=8", prune=0.8, quantize="int8", aware=True)
    assert asked.form == (Step("distil", detail="width=8"), Step("prune", 0.8, "unstructured"), Step("aware"),
                          Step("int8"))
    assert names(asked) == ["distil_width=8-prune_0.8-aware-int8"]


@pytest.mark.parametrize(("asked", "name"), [
    (Asked(prune=0.5, pattern="filters"), "narrow_0.5"), (Asked(prune=0.5, pattern="2:4"), "prune_0.5_2of4"),
    (Asked(student="./my recipe.py"), "distil_._my_recipe.py"), (Asked(quantize="float16"), "float16")])
def test_each_form_has_a_folder_of_its_own(asked, name):
    assert names(asked) == [name]
    assert "/" not in name


def test_milder_forms_follow_where_a_bound_is_to_hold():
    found = names(Asked(prune=0.8, quantize="int8", max_drop=0.01))
    assert found[:3] == ["prune_0.8-int8", "prune_0.8-aware-int8", "prune_0.72-aware-int8"]
    assert found[-6:] == ["aware-int8", "int8_0.1_float", "int8_0.25_float", "int8_0.5_float", "dynamic", "float16"]
    assert len(found) == len(set(found))


def test_a_share_that_rounds_to_nothing_is_no_form():
    assert names(Asked(prune=0.001, max_drop=0.0)) == ["prune_0.001"]


def test_a_target_is_searched_from_the_mildest_form_on():
    assert names(Asked(target=Target("size", 1e5)))[:4] == ["float16", "dynamic", "int8", "narrow_0.75-int8"]
    assert names(Asked(target=Target("macs", 0.5))) == ["narrow_0.5"]
    assert all(name.startswith("prune_0.8-") for name in names(Asked(prune=0.8, target=Target("size", 1e5))))


@pytest.mark.parametrize(("text", "kind", "most"), [
    ("size=200KB", "size", 200e3), ("size = 1.5 mb", "size", 1.5e6), ("latency=800us", "latency", 0.8),
    ("latency=1ms", "latency", 1.0), ("macs=50%", "macs", 0.5), ("macs=0.25", "macs", 0.25)])
def test_targets_have_units(text, kind, most):
    found = parse_target(text)
    assert (found.kind, found.most) == (kind, pytest.approx(most))


@pytest.mark.parametrize("text", ["size", "size=", "size=KB", "size=2ms", "latency=3KB", "macs=200%", "macs=0",
                                  "size=-1B", "speed=3", "size=1.2.3KB", ""])
def test_a_target_that_cannot_be_read_is_refused(text):
    with pytest.raises(UsageError, match="--target"):
        parse_target(text)


def test_everything_that_is_wrong_is_said_at_once():
    asked = Asked(prune=1.5, pattern="stripes", quantize="int3", aware=True, max_drop=2.0)
    with pytest.raises(UsageError) as caught:
        check(asked, epochs=0, learning_rate=float("nan"), temperature=0.0, alpha=1.1)
    for word in ("--prune", "--pattern", "--quantize", "--aware", "--max-drop", "--epochs", "--learning-rate",
                 "--temperature", "--alpha"):
        assert word in str(caught.value)


@pytest.mark.parametrize("asked", [Asked(), Asked(pattern="filters"), Asked(prune=0.7, pattern="2:4"),
                                   Asked(quantize="float16", aware=True)])
def test_what_makes_no_sense_is_refused(asked):
    with pytest.raises(UsageError):
        check(asked, **FINE)


def test_what_makes_sense_is_not_refused():
    check(Asked(prune=0.5, pattern="2:4", quantize="int8", aware=True, max_drop=0.0), **FINE)
    check(Asked(target=Target("size", 1.0)), **FINE)
