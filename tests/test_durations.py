"""Lengths of time on the command line."""

import pytest

from hpcai_cli import durations
from hpcai_cli.cadence import Cadence
from hpcai_cli.errors import UsageError


@pytest.mark.parametrize(("text", "expected"), [
    ("90", 90), ("90s", 90), ("1.5m", 90), ("2h", 7_200), ("1h30m", 5_400), (" 1D ", 86_400), ("0.5s", 0.5)])
def test_lengths_of_time(text, expected):
    assert durations.seconds(text, what="--max-time") == expected


@pytest.mark.parametrize("text", ["", "0", "-1s", "1 hour", "h", "1h30", "1e3s", "nan", "inf", "9" * 40])
def test_what_is_none(text):
    with pytest.raises(UsageError, match="--max-time takes a length of time"):
        durations.seconds(text, what="--max-time")


@pytest.mark.parametrize(("length", "expected"), [(20, "20 s"), (600, "10 min"), (7_200, "2.0 h")])
def test_as_people_say_them(length, expected):
    assert durations.words(length) == expected


@pytest.mark.parametrize(("every", "expected"), [
    ((), Cadence(keep=3)), (("2epochs",), Cadence(epochs=2, keep=3)),
    (("500steps",), Cadence(steps=500, seconds=0, keep=3)), (("1 step",), Cadence(steps=1, seconds=0, keep=3)),
    (("30s",), Cadence(seconds=30, keep=3)), (("10m", "3epochs"), Cadence(epochs=3, seconds=600, keep=3)),
    (("100steps", "1h"), Cadence(steps=100, seconds=3_600, keep=3))])
def test_when_a_checkpoint_is_due(every, expected):
    assert Cadence.of(every, 3) == expected
    assert Cadence.of(expected.words(), 3) == expected


@pytest.mark.parametrize("every", [("0steps",), ("often",), ("",), ("2epochs", "3epochs"), ("10s", "1m"), ("-5s",)])
def test_what_says_no_such_thing(every):
    with pytest.raises(UsageError, match="--checkpoint-every"):
        Cadence.of(every, 2)
