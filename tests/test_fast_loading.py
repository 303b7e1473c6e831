"""TensorFlow and Keras load without what they do without, which loads all the same where it is asked for."""

import os
import subprocess
import sys

import pytest

from hpcai_cli.fast_loading import UNUSED

LOADED = """
import gc, sys
from hpcai_cli import fast_loading
fast_loading.hasten()
fast_loading.hasten()
{before}
import {first}
import keras, tensorflow
found = [name for name in fast_loading.UNUSED if name in sys.modules]
import matplotlib, pandas, sklearn
print(found, gc.isenabled(), keras.layers.Dense(2)(tensorflow.ones([1, 3])).shape)
"""


@pytest.mark.parametrize("first", ["keras", "tensorflow"])
def test_what_keras_does_without_is_not_loaded_with_it(first):
    assert loaded(first) == "[] True (1, 2)"


def test_what_was_loaded_before_stays_and_so_does_a_collector_that_was_off():
    assert loaded("keras", before="import gc, pandas; gc.disable()") == "['pandas'] False (1, 2)"


def test_keras_would_load_all_of_it_by_itself():
    """Or there is nothing to gain, and the finder can go."""
    assert run(f"import keras, sys; print([name for name in {UNUSED} if name not in sys.modules])") == "[]"


def loaded(first: str, before: str = "") -> str:
    return run(LOADED.format(first=first, before=before))


def run(code: str) -> str:
    environ = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "KERAS_BACKEND": "tensorflow"}
    return subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True,
                          timeout=300).stdout.strip()
