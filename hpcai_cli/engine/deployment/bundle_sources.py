"""The sources of ours that a program needs, found by following its imports."""

import ast
from collections.abc import Iterator
from pathlib import Path

import hpcai_cli

OPENERS = {"tflite": "hpcai_cli.engine.tflite_file", "onnx": "hpcai_cli.engine.onnx_file",
           "saved_model": "hpcai_cli.engine.saved_model_file", "keras": "hpcai_cli.engine.model_file"}
"""For each kind of model the module that opens its files, and with it loads the kind's library."""


def sources(start: str, kind: str) -> dict[str, Path]:
    """Return the files that a module needs to run models of one kind, by their path in a folder on sys.path.

    Imports are followed at the top of modules and within functions alike. Left out are those for type checkers only,
    and the modules that open other kinds of models: so it is that nothing of TensorFlow comes along with a TFLite or
    ONNX model. Files beside the first module that are no sources (a page, a picture) come along.

    Args:
        start: full name of the module that is run.
    """
    root = Path(hpcai_cli.__file__).parents[1]
    others = set(OPENERS.values()) - {OPENERS[kind]}
    waiting, found = list(_places(start, root)), {}
    while waiting:
        name, file = waiting.pop()
        if name in found or name in others:
            continue
        found[name] = file
        for imported in _imports(ast.parse(file.read_bytes())):
            waiting += _places(imported, root)
    assert start in found, f"{start} is no module of ours"
    data = [file for file in found[start].parent.iterdir()
            if file.is_file() and not file.name.startswith(".") and file.suffix not in (".py", ".pyc")]
    return {file.relative_to(root).as_posix(): file for file in sorted([*found.values(), *data])}


def _places(name: str, root: Path) -> Iterator[tuple[str, Path]]:
    """Yield name and file of each package and module of ours on the way to a full name, which may end in a function."""
    parts = name.split(".") if name.split(".")[0] == hpcai_cli.__name__ else []
    for count in range(1, len(parts) + 1):
        path = root.joinpath(*parts[:count])
        for file in (path / "__init__.py", path.with_suffix(".py")):
            if file.is_file():
                yield ".".join(parts[:count]), file


def _imports(node: ast.AST) -> Iterator[str]:
    """Yield the full names of what is imported in a piece of source."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            continue
        if isinstance(child, ast.Import):
            yield from (name.name for name in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from (f"{child.module}.{name.name}" for name in child.names)
        yield from _imports(child)
