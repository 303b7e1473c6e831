"""What a training needs to know, as one frozen value: Recipe, its changes by `--set`, to and from JSON."""

import ast
import dataclasses
import difflib
import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from hpcai_cli.errors import DataError, UsageError


def _number(default, *, least=None, above=None, most=None):
    return field(default=default, metadata={"least": least, "above": above, "most": most})


def _choice(default: str, *values: str):
    return field(default=default, metadata={"choices": values})


@dataclass(frozen=True)
class File:
    """One file of a data set as its mirrors offer it."""

    name: str
    """File name below the mirror's address."""
    sha256: str
    """Checksum of the content, after gunzip of a single file (.gz, not .tar.gz): mirrors compress it differently."""
    bytes: int
    """Upper bound of the download's size; an answer that is larger is refused."""


@dataclass(frozen=True)
class Downloads:
    """Where a recipe's raw files can be had."""

    mirrors: tuple[str, ...]
    """Addresses ending in a slash, tried in turn."""
    files: tuple[File, ...]
    """All files that are needed."""


_FIXED = {"name", "summary", "options", "presets", "search"}
"""Fields that make up the recipe's identity, or hold others."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides how a training runs; the trainer adds no default of its own.

    Each field's help is the line under it; `hpcai recipes show` prints them.
    """

    name: str
    """The recipe's name on the command line, the same as its file's."""
    summary: str
    """One line for `hpcai recipes list`."""
    input_shape: tuple[int, ...] = ()
    """Shape of one example, without the batch; empty takes the data's."""
    task: str = _choice("classification", "classification", "regression")
    """What the model answers: a class, or a number."""
    num_classes: int = _number(0, least=0)
    """Number of classes; labels are 0 to num_classes - 1. 0 takes the data's; regression has none."""
    class_names: tuple[str, ...] = ()
    """Names of the classes in the order of their labels; when empty the data's, or the numbers themselves."""
    inputs: str = _choice("images", "images", "features")
    """What an example is, and its name in the dataset file."""
    dataset: str = ""
    """The recipe whose data this one trains on; its own when empty."""
    test_fraction: float = _number(0.0, least=0.0, most=0.5)
    """Share of the examples that preprocess sets aside for the test split, where the source brings none."""
    validation_fraction: float = _number(0.0, least=0.0, most=0.5)
    """Share of the training examples that preprocess sets aside to choose the best epoch by."""
    epochs: int = _number(1, least=1)
    """How many times each training example is seen."""
    batch_size: int = _number(32, least=1)
    """Examples per process and gradient."""
    accumulation_steps: int = _number(1, least=1)
    """Gradients summed before each step of the optimizer, to train with batches that memory cannot hold."""
    optimizer: str = _choice("adam", "adam", "adamw", "sgd", "lamb")
    """Keras optimizer."""
    learning_rate: float = _number(1e-3, above=0.0)
    """Peak learning rate for one process."""
    learning_rate_scaling: str = _choice("linear", "linear", "sqrt", "none")
    """How the learning rate grows with the number of processes (linear: arXiv 1706.02677)."""
    schedule: str = _choice("cosine", "cosine", "constant")
    """Course of the learning rate after the warm-up; cosine falls to zero (arXiv 1608.03983)."""
    final_share: float = _number(0.0, least=0.0, most=1.0)
    """Share of the epochs, the last ones, that train on what final_augment gives: more like what is asked later."""
    warmup_epochs: float = _number(0.0, least=0.0)
    """Epochs over which the learning rate rises linearly to its peak."""
    momentum: float = _number(0.9, least=0.0, most=1.0)
    """Momentum of sgd; the other optimizers don't use it."""
    weight_decay: float = _number(0.0, least=0.0)
    """Decoupled weight decay."""
    clip_norm: float = _number(0.0, least=0.0)
    """Largest norm of the whole gradient; 0 leaves it as it is."""
    label_smoothing: float = _number(0.0, least=0.0, most=0.9)
    """Probability mass taken from the true class and spread over all (arXiv 1512.00567)."""
    mixup: float = _number(0.0, least=0.0, most=10.0)
    """Each example is laid over another; shares from Beta(mixup, mixup) (arXiv 1710.09412). 0 leaves them apart."""
    class_weights: str = _choice("none", "none", "balanced")
    """Weights of the examples in the loss; balanced gives each class the same sum of weights."""
    decision_threshold: str = _choice("half", "half", "f1")
    """Of two classes, the probability from which on the second is the answer; f1 chooses the best F1 on validation."""
    best_by: str = _choice("loss", "loss", "accuracy", "roc_auc")
    """The validation figure that the best epoch is chosen by."""
    early_stopping_patience: int = _number(0, least=0)
    """Epochs without a better validation figure (best_by) after which training ends; 0 never ends it early."""
    sync_batch_norm: bool = False
    """Batch normalization over the examples of all processes, not of each its own; for small batches."""
    gradient_compression: str = _choice("none", "none", "float16")
    """How gradients travel between processes; float16 halves their bytes and rounds them."""
    gradient_reduction: str = _choice("average", "average", "adasum")
    """How the processes' gradients become one; adasum (arXiv 2006.02924) needs MPI and a power of two of processes."""
    precision: str = _choice("auto", "auto", "float32", "mixed_bfloat16", "mixed_float16")
    """Keras dtype policy; auto looks at the hardware and says why."""
    seed: int = _number(0, least=0, most=2**32 - 1)
    """Seed of weights, order, dropout and augmentation."""
    options: Mapping[str, object] = field(default_factory=dict)
    """The model's own settings; each can be set like any other field."""
    presets: Mapping[str, Mapping] = field(default_factory=dict)
    """For an option its possible values, and the fields that each of them brings along; what is set by hand wins."""
    search: Mapping[str, str] = field(default_factory=dict)
    """What `hpcai tune` tries where nothing else is said, such as learning_rate: log:1e-4:1e-1."""

    def __post_init__(self):
        for entry in dataclasses.fields(self):
            object.__setattr__(self, entry.name, _checked(entry.name, getattr(self, entry.name), entry, self))
        clashes = sorted(set(self.options) & {entry.name for entry in dataclasses.fields(self)})
        if clashes:
            raise UsageError(f"recipe {self.name}: options {', '.join(clashes)} have the names of fields",
                             expected="names of their own")
        for option, choices in self.presets.items():
            self._check_preset(option, choices)
        if min(self.input_shape, default=1) < 1:
            raise UsageError(f"recipe {self.name}: input_shape has no examples", expected="positive sizes",
                             received=self.input_shape)
        if self.num_classes == 1 or self.num_classes and self.task == "regression":
            raise UsageError(f"recipe {self.name}: num_classes is out of range", received=self.num_classes,
                             expected="none for a regression" if self.task == "regression" else "2 or more, or 0")
        if self.class_names and len(self.class_names) != self.num_classes:
            raise UsageError(f"recipe {self.name}: class_names has {len(self.class_names)} names",
                             expected=f"num_classes = {self.num_classes} of them", received=list(self.class_names))

    def _check_preset(self, option: str, choices: object) -> None:
        """Check what an option's values bring along: a name that nothing has would be lost without a word."""
        if not isinstance(choices, Mapping) or not all(isinstance(brought, Mapping) for brought in choices.values()):
            raise UsageError(f"recipe {self.name}: the presets of {option} are none", received=choices,
                             expected='{"value": {"field": value}}')
        if self.options.get(option) not in choices:
            raise UsageError(f"{option} is unknown", expected=f"one of {', '.join(choices)}",
                             received=self.options.get(option))
        fields = {entry.name: entry for entry in dataclasses.fields(self)}
        for value, brought in choices.items():
            for name, setting in brought.items():
                if name in fields and name not in _FIXED:
                    _checked(name, setting, fields[name], self)
                elif name not in self.options or type(setting) is not type(self.options[name]):
                    raise UsageError(f"recipe {self.name}: {option}={value} brings {name}, which fits no field or "
                                     "option", expected="values of the same types", received=setting)

    def peak_learning_rate(self, size: int) -> float:
        """Return the schedule's highest learning rate in a job of `size` ranks, by learning_rate_scaling."""
        return self.learning_rate * {"linear": size, "sqrt": size**0.5, "none": 1.0}[self.learning_rate_scaling]

    def override(self, assignments: Mapping[str, str]) -> "Recipe":
        """Return the recipe with some fields or options set from text, typed by their defaults.

        Raises:
            UsageError: all keys that are unknown and all values that don't fit, at once.
        """
        values, options, problems = self._values(), dict(self.options), []
        assignments = {key.replace("-", "_"): text for key, text in assignments.items()}
        for option, choices in self.presets.items():
            brought = choices.get(assignments.get(option), {})
            values |= {name: value for name, value in brought.items() if name in values}
            options |= {name: value for name, value in brought.items() if name in options}
        fields = {entry.name: entry for entry in dataclasses.fields(self)}
        for name, text in assignments.items():
            try:
                if name in fields and name not in _FIXED:
                    values[name] = _checked(name, _typed(name, text, values[name]), fields[name], self)
                elif name in options:
                    options[name] = _finite(name, _typed(name, text, options[name]))
                elif name in fields:
                    raise UsageError(f"{name} cannot be set", mend="run `hpcai recipes copy` for a recipe of your own",
                                     received=text)
                else:
                    known = [*(fields.keys() - _FIXED), *options]
                    raise UsageError(f"recipe {self.name} has no field {name[:60]!r}{nearest(name, known)}",
                                     mend=f"run `hpcai recipes show {self.name}` for all of them", received=name)
            except UsageError as error:
                problems.append(str(error))
        if problems:
            raise UsageError("; and ".join(problems[:8]))
        return Recipe(**{**values, "options": options})

    def to_json(self) -> dict:
        """Return the recipe as plain JSON values."""
        return json.loads(json.dumps({**self._values(), "options": dict(self.options),
                                      "presets": {name: dict(choices) for name, choices in self.presets.items()},
                                      "search": dict(self.search)}))

    @classmethod
    def from_json(cls, document: object, *, where: str) -> "Recipe":
        """Build a recipe from what `to_json` gave; `where` names the file in errors.

        Raises:
            DataError: the document is not a recipe.
        """
        if not isinstance(document, dict):
            raise DataError(f"{where} holds no recipe", expected="a JSON object", received=type(document).__name__)
        known = {entry.name for entry in dataclasses.fields(cls)}
        unknown = sorted(set(document) - known)
        if unknown:
            raise DataError(f"{where} has fields that no recipe has", expected="fields of this version of hpcai",
                            received=", ".join(unknown))
        try:
            return cls(**document)
        except (UsageError, TypeError) as error:
            raise DataError(f"{where} holds no valid recipe: {error}") from None

    def _values(self) -> dict:
        return {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}


@cache
def field_help() -> dict[str, str]:
    """Return each field's help: the string under it in the source of Recipe."""
    body = ast.parse(inspect.getsource(Recipe)).body[0].body
    return {above.target.id: below.value.value for above, below in zip(body, body[1:], strict=False)
            if isinstance(above, ast.AnnAssign) and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)}


def read_values(path: Path) -> dict[str, str]:
    """Read the settings of a recipe.json or a TOML file as assignments for `override`.

    Raises:
        DataError: the file is missing or is neither.
    """
    try:
        text = path.read_text()
        values = parse_toml(text) if path.suffix == ".toml" else json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("it holds no object at its top")
    except FileNotFoundError:
        raise DataError("the file given with --from does not exist", received=str(path)) from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read settings from {path}: {error}", expected="a recipe.json or a TOML file") from None
    options = values.pop("options", {})
    merged = {**values, **(options if isinstance(options, dict) else {"options": options})}
    # A recipe.json names its own recipe; the one on the command line is the one that counts.
    return {key: value if isinstance(value, str) else json.dumps(value, default=str) for key, value in merged.items()
            if key not in ("name", "summary", "presets", "search")}


def parse_assignments(pairs: list[str], *, what: str = "--set") -> dict[str, str]:
    """Split `key=value` strings, of the option that `what` names.

    Raises:
        UsageError: one has no equals sign or no key.
    """
    wrong = [pair for pair in pairs if "=" not in pair or pair.startswith("=")]
    if wrong:
        raise UsageError(f"cannot read {what}", expected="key=value", received=", ".join(wrong))
    return dict(pair.split("=", 1) for pair in pairs)


def parse_toml(text: str) -> dict:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    return tomllib.loads(text)


def nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f", perhaps {near[0]!r}" if near else ""


def _typed(name: str, text: str, default: object) -> object:
    """Read text as the type of the default."""
    try:
        if isinstance(default, bool):
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        if isinstance(default, int):
            return int(text.replace("_", ""))
        if isinstance(default, float):
            return float(text)
        if isinstance(default, (tuple, list)):
            items = json.loads(text) if text.startswith("[") else text.split(",")
            inner = default[0] if default else (0 if name == "input_shape" else "")
            return tuple(_typed(name, str(item), inner) for item in items)
        return text
    except (ValueError, KeyError):
        kind = "true or false" if isinstance(default, bool) else f"a value like {default!r}"
        raise UsageError(f"cannot set {name}", expected=kind, received=text) from None


def _finite(name: str, value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{name} is not a number", expected="a finite number", received=value)
    return value


def _checked(name: str, value: object, entry: dataclasses.Field, recipe: Recipe) -> object:
    """Return the value in its field's own type, or say what is wrong with it."""
    kind = str(entry.type)
    rules = entry.metadata
    if kind.startswith("<class"):
        kind = entry.type.__name__
    if kind == "float" and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind.startswith("tuple"):
        value = tuple(value) if isinstance(value, (list, tuple)) else value
        items = int if "int" in kind else str
        right = isinstance(value, tuple) and all(type(item) is items for item in value)
    elif "Mapping" in kind:
        right = isinstance(value, Mapping)
        for option, chosen in value.items() if right else ():
            _finite(option, chosen)
    else:
        right = type(value).__name__ == kind
    if not right:
        raise UsageError(f"{name} has the wrong type", expected=kind, received=value)
    _finite(name, value)
    if "choices" in rules and value not in rules["choices"]:
        raise UsageError(f"{name} is unknown", expected=f"one of {', '.join(rules['choices'])}", received=value)
    for rule, broken, words in (("least", lambda limit: value < limit, "at least"),
                                ("above", lambda limit: value <= limit, "a number above"),
                                ("most", lambda limit: value > limit, "at most")):
        if rules.get(rule) is not None and broken(rules[rule]):
            raise UsageError(f"{name} is out of range", expected=f"{words} {rules[rule]}", received=value)
    return value
