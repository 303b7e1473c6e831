"""Lets TensorFlow and Keras load faster: without what Keras would try to load for itself, and without collections."""

import contextlib
import gc
import sys
from collections.abc import Iterator
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder

UNUSED = ("matplotlib", "pandas", "sklearn")
"""What Keras loads where it is installed and does without where it is not: for the pictures of `keras.visualization`,
`fit` on data frames, and its wrappers for scikit-learn. We use none of these, and load these packages where needed."""
_SLOW = ("keras", "tensorflow")


class _Finder(MetaPathFinder):
    def __init__(self) -> None:
        self._is_loading = False

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if self._is_loading and name in UNUSED:
            raise ModuleNotFoundError(f"{name} is not loaded together with Keras", name=name)
        if self._is_loading or name not in _SLOW:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec and spec.loader:
            execute = spec.loader.exec_module

            def hastened(module: object) -> None:
                with self._loading():
                    execute(module)

            spec.loader.exec_module = hastened
        return spec

    @contextlib.contextmanager
    def _loading(self) -> Iterator[None]:
        # What loads stays: looking for garbage among it, now or later, takes long and finds none.
        is_collecting, self._is_loading = gc.isenabled(), True
        gc.disable()
        try:
            yield
        finally:
            gc.freeze()
            self._is_loading = False
            if is_collecting:
                gc.enable()


def hasten() -> None:
    """Let TensorFlow and Keras load faster, should they be loaded in this process."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
