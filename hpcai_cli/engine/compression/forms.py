"""Compresses a trained run in steps, each of which leaves a run folder of its own below RUN/compressed.

A form is what is done to the model, step after step: distil, prune, train under quantization, convert. Forms that begin
with the same steps share them, and a step that was finished is not done again.
"""

import dataclasses
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import keras
import numpy as np

from hpcai_cli import console
from hpcai_cli.engine import checkpoint, evaluation, model_file, training
from hpcai_cli.engine.compression import quantization, quantization_training, sensitivity
from hpcai_cli.engine.compression.beginning import begun
from hpcai_cli.engine.compression.distillation import Teacher
from hpcai_cli.engine.compression.plan import CONVERSIONS, Form, Step, name_of
from hpcai_cli.engine.compression.pruning import END, KeptZeros, MagnitudePruning
from hpcai_cli.engine.distributed import Horovod, Serial, on_rank_zero
from hpcai_cli.engine.model import settle_statistics
from hpcai_cli.engine.pipeline import epoch_order
from hpcai_cli.engine.store import Dataset
from hpcai_cli.engine.task import task_of
from hpcai_cli.errors import DataError, StoppedEarly, UnsuitableError, UsageError
from hpcai_cli.recipe import Recipe
from hpcai_cli.run import Run, read_json, write_bytes, write_json
from hpcai_cli.signals import StopRequest

_GO_ON = "run the same command again to go on from there"
_LEARNED_RANGES = "learned-ranges.tflite"
_EPOCHS = {"prune": 1.0, "narrow": 0.5, "aware": 0.25}
"""Epochs of a fine-tuning, as a share of the recipe's."""
_LEARNING_RATE = {"prune": 0.5, "narrow": 0.5, "aware": 0.1}
"""Its learning rate at the start, likewise."""


@dataclass
class Compression:
    """What compressing a run works with."""

    run: Run
    recipe: Recipe
    dataset: Dataset
    ranks: Serial | Horovod
    augment: Callable | None = None
    """augment(inputs, seed) of the run's recipe."""
    student: Recipe | None = None
    build_student: Callable[[Recipe], keras.Model] | None = None
    student_reference: str = ""
    """What finds the student's recipe again."""
    final_augment: Callable | None = None
    student_augment: Callable | None = None
    student_final_augment: Callable | None = None
    student_adapt: Callable | None = None
    temperature: float = 4.0
    alpha: float = 0.7
    epochs: int | None = None
    """Of each training; None for a share of the recipe's."""
    learning_rate: float | None = None
    force: bool = False
    """Replace what was made with other settings."""
    trust: bool = False
    stop: StopRequest = field(default_factory=StopRequest)

    def make(self, form: Form) -> Run:
        """Bring the run into a form, unless it is there, and return the form's run folder.

        Raises:
            UsageError: the folder holds the form made with other settings.
            StoppedEarly: a signal came; the same call goes on from there.
        """
        if not form:
            return self.run
        parent, step = self.make(form[:-1]), form[-1]
        made = Run(self.run.compressed / name_of(form))
        recipe = self._recipe_of(form, parent)
        key = on_rank_zero(self.ranks, lambda: self._key(step, parent, recipe))
        if on_rank_zero(self.ranks, lambda: self._is_there(made, key)):
            return made
        console.note(f"{made.folder}: {step.name}")
        on_rank_zero(self.ranks, lambda: self._describe(made, parent, step, recipe, key))
        try:
            if step.kind in CONVERSIONS:
                on_rank_zero(self.ranks, lambda: self._convert(step, parent, made))
            else:
                self._train(form, parent, made, recipe)
        except UnsuitableError:
            # Nothing was made, and what describes it would only be in the way.
            on_rank_zero(self.ranks, lambda: shutil.rmtree(made.folder, ignore_errors=True))
            raise
        return made

    def raise_if_stopped(self) -> None:
        """End here where a signal has asked any rank for it; what is made stays.

        Raises:
            StoppedEarly: it has.
        """
        if self.ranks.gather(np.array([bool(self.stop.received)])).any():
            raise StoppedEarly(f"stopped by {self.stop.received or 'a signal on another rank'}", mend=_GO_ON)

    def _recipe_of(self, form: Form, parent: Run) -> Recipe:
        """Return the recipe of a form's last step; a conversion has that of the step before."""
        kind, base = form[-1].kind, self.student if form[0].kind == "distil" else self.recipe
        if kind in CONVERSIONS:
            return self.recipe if parent is self.run else self._recipe_of(form[:-1], parent)
        changes = {"epochs": self.epochs or max(1, round(base.epochs * _EPOCHS.get(kind, 1.0))),
                   "learning_rate": self.learning_rate or base.learning_rate * _LEARNING_RATE.get(kind, 1.0)}
        if kind != "distil":
            changes |= {"warmup_epochs": 0.0, "schedule": "cosine", "early_stopping_patience": 0}
        return dataclasses.replace(base, **changes)

    def _key(self, step: Step, parent: Run, recipe: Recipe) -> str:
        """Return what tells the result of a step from that of the same step with other settings."""
        teacher = [] if step.kind in CONVERSIONS else [self.temperature, self.alpha]
        digest = hashlib.sha256(json.dumps([dataclasses.asdict(step), recipe.to_json(), self.dataset.fingerprint,
                                            teacher], sort_keys=True, default=str).encode())
        for file in (parent.model_file, self.run.model_file):
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        return digest.hexdigest()

    def _is_there(self, made: Run, key: str) -> bool:
        """Tell whether a form is finished; one that was begun stays to be gone on with."""
        if not made.manifest_file.is_file():
            return False
        if made.manifest().get("compression_key") == key:
            return made.result_file.is_file()
        # What is converted only to be compared with is nobody's.
        if not self.force and made.manifest().get("compression_step", {}).get("kind") != "float32":
            raise UsageError(f"{made.folder} was made with other settings or from another model",
                             mend="replace it with --force", received=str(made.folder))
        shutil.rmtree(made.folder)
        return False

    def _describe(self, made: Run, parent: Run, step: Step, recipe: Recipe, key: str) -> None:
        manifest = parent.manifest() | {
            "compression_step": dataclasses.asdict(step), "compression_key": key,
            "compressed_from": os.path.relpath(parent.folder, made.folder),
            "data": os.path.abspath(self.dataset.path), "data_fingerprint": self.dataset.fingerprint}
        if step.kind == "distil":
            manifest |= {"recipe_reference": self.student_reference}
        write_json(made.recipe_file, recipe.to_json())
        write_json(made.manifest_file, manifest)

    def _train(self, form: Form, parent: Run, made: Run, recipe: Recipe) -> None:
        step, options, build = form[-1], {}, self.build_student
        augment, final_augment = ((self.student_augment, self.student_final_augment) if form[0].kind == "distil"
                                  else (self.augment, self.final_augment))
        if self.alpha:
            # What was pruned or rounded learns again from the one who knows, and not from the labels alone.
            options["teacher"] = self._teacher(recipe, changing=augment is not None or recipe.mixup > 0 or (
                final_augment is not None and recipe.final_share > 0))
        if step.kind == "distil":
            options["adapt"] = self._begin_student
        else:
            # A loaded Dropout draws its seed anew, by which no two trainings would be the same.
            keras.utils.set_random_seed(recipe.seed)
            model, left_alone = begun(step, model_file.load(parent.model_file, trust=self.trust), self._calibration())
            on_rank_zero(self.ranks, lambda: _note_left_alone(made, left_alone))
            if step.kind == "prune":
                options["prune"] = lambda model, steps: MagnitudePruning(
                    model, sparsity=step.amount, pattern=step.detail, steps=steps)
                # Before that the weights are not all gone, and an earlier epoch would be chosen for it.
                options["first_choice"] = int(END * recipe.epochs) + 1
            elif step.kind == "aware":
                options["finished"] = partial(_finish_aware, made)
                if any(earlier.kind == "prune" for earlier in form):
                    options["prune"] = lambda model, steps: KeptZeros(model)

            def build(recipe: Recipe) -> keras.Model:
                return model
        job = training.Job(recipe, made, self.dataset, self.ranks, build, augment, stop=self.stop,
                           final_augment=final_augment, **options)
        resume = on_rank_zero(self.ranks, lambda: _can_go_on(made))
        try:
            training.train(job, resume=resume)
        except StoppedEarly as error:
            raise StoppedEarly(str(error).partition(";")[0], mend=_GO_ON) from None

    def _begin_student(self, student: keras.Model, inputs: np.ndarray, labels: np.ndarray, recipe: Recipe) -> None:
        """Give a student the teacher's weights where it has the same, as when it only looks less closely; else let its
        recipe fit what it takes from the data."""
        teacher = model_file.load(self.run.model_file, trust=self.trust)
        if [weight.shape for weight in student.weights] == [weight.shape for weight in teacher.weights]:
            console.note("the student begins with the teacher's weights, which have the same shapes")
            student.set_weights(teacher.get_weights())
            settle_statistics(student)
        elif self.student_adapt is not None:
            self.student_adapt(student, inputs, labels)

    def _teacher(self, recipe: Recipe, *, changing: bool) -> Teacher:
        """Return the run as a teacher; its answers are kept in a file where no example changes from epoch to epoch."""
        model, task = model_file.load(self.run.model_file, trust=self.trust), task_of(self.recipe)
        common = {"temperature": self.temperature, "alpha": self.alpha}
        if changing:
            return Teacher(recipe, scores=lambda inputs: task.scores(model(inputs, training=False)), **common)
        known = hashlib.sha256(self.run.model_file.read_bytes() + self.dataset.fingerprint.encode()).hexdigest()
        file = self.run.compressed / f"teacher-{known[:16]}.npy"
        if not on_rank_zero(self.ranks, file.is_file):
            scores = evaluation.scores_of(evaluation.forward(model, self.recipe), self.dataset.split("train"),
                                          self.ranks, columns=task.columns)
            on_rank_zero(self.ranks, lambda: _write_array(file, scores))
        return Teacher(recipe, cached=np.load(file), **common)

    def _calibration(self) -> np.ndarray:
        """Return training examples, chosen by the seed, by which the ranges of activations are found."""
        split = self.dataset.split("train")
        rows = epoch_order(len(split), seed=self.recipe.seed, epoch=0)[:quantization.CALIBRATION_EXAMPLES]
        return split.inputs[np.sort(rows)]

    def _convert(self, step: Step, parent: Run, made: Run) -> None:
        trained = parent.folder / _LEARNED_RANGES
        if step.kind == "int8" and trained.is_file():
            content = trained.read_bytes()
        else:
            model, calibration = model_file.load(parent.model_file, trust=self.trust), self._calibration()
            keep_float = sensitivity.most_sensitive(model, calibration, step.amount) if step.amount else ()
            content = quantization.convert(model, self.recipe.input_shape, kind=step.kind, calibration=calibration,
                                           keep_float=keep_float)
        write_bytes(made.tflite_file, content)
        if step.kind == "int8":
            _note_left_alone(made, quantization.left_in_float(content))
        before = read_json(parent.result_file) if parent.result_file.is_file() else {}
        write_json(made.result_file, {"schema": "hpcai.train/1", "command": "compress", "run": str(made.folder),
                                      "recipe": self.recipe.name, "metrics": {},
                                      "decision_threshold": before.get("decision_threshold")})


def _can_go_on(made: Run) -> bool:
    try:
        checkpoint.newest(made.checkpoints)
    except DataError:
        # It was stopped before its first checkpoint, or that is damaged: there is nothing to lose.
        return False
    return True


def _note_left_alone(made: Run, names: Iterable[str]) -> None:
    """Say which layers a step could not change, and keep that with the form."""
    names = list(names)
    if names:
        console.note(f"{made.folder.name}: left as they are: {', '.join(names)}")
    write_json(made.manifest_file, made.manifest() | {"left_alone": names})


def _finish_aware(made: Run, model: keras.Model) -> keras.Model:
    """Keep the int8 model with the ranges that were learned in training, and return the float one."""
    recipe = made.recipe()
    write_bytes(made.folder / _LEARNED_RANGES, quantization.convert(model, recipe.input_shape, kind="int8"))
    return quantization_training.without_fake_quantization(model)


def _write_array(path: Path, array: np.ndarray) -> None:
    content = io.BytesIO()
    np.save(content, array)
    write_bytes(path, content.getvalue())
