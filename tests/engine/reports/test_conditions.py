"""Conditions on figures: read, known, held or not."""

import pytest

from hpcai_cli.engine.reports import conditions
from hpcai_cli.errors import DataError, GateError, UsageError


@pytest.mark.parametrize(("text", "value", "holds"), [
    ("accuracy>=0.9", 0.9, True), ("accuracy > 0.9", 0.9, False), (" accuracy<=1e-3 ", 0.001, True),
    ("accuracy<0.5", 0.5, False), ("accuracy==1", 1.0, True)])
def test_a_condition_holds_or_not(text, value, holds):
    condition = conditions.parse(text)
    if holds:
        conditions.check([condition], {"accuracy": value}, "test")
    else:
        with pytest.raises(GateError, match=f"accuracy is {value:g} where "):
            conditions.check([condition], {"accuracy": value}, "test")


@pytest.mark.parametrize("text", ["", "accuracy", "accuracy>=", ">=1", "accuracy>=much", "a b>=1", "accuracy=1"])
def test_what_is_no_condition(text):
    with pytest.raises(UsageError, match="cannot read --require"):
        conditions.parse(text)


def test_all_that_fail_are_named_and_what_has_no_value_first():
    asked = [conditions.parse(text) for text in ("accuracy>=0.9", "loss<=0.1", "f1>=0")]
    with pytest.raises(GateError, match="accuracy is 0.5 .* is required; loss is 2 where loss<=0.1 is required"):
        conditions.check(asked, {"accuracy": 0.5, "loss": 2.0, "f1": 1.0}, "test")
    with pytest.raises(DataError, match="f1 has no value on the validation split"):
        conditions.check(asked, {"accuracy": 0.5, "loss": 2.0}, "validation")


def test_names_are_known_with_the_ends_of_their_intervals():
    def check(text):
        conditions.check_names([conditions.parse(text)], ["accuracy", "calibration_error"], ["accuracy"],
                               {"difference": "--compare MODEL"})

    check("accuracy_low>=0.5")
    check("calibration_error<=0.5")
    for text, words in (("calibration_error_low>=1", "knows no 'calibration_error_low'"),
                        ("acuracy>=1", "perhaps 'accuracy'"), ("difference>0", "without --compare MODEL")):
        with pytest.raises(UsageError, match=words):
            check(text)
