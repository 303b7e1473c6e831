"""Tries the forms of a compression until one holds what was promised, and reports what each of them gains and costs."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from hpcai_cli import console
from hpcai_cli.engine import distributed, evaluation, hardware, model_file
from hpcai_cli.engine.compression import inference_cost, table
from hpcai_cli.engine.compression.forms import Compression
from hpcai_cli.engine.compression.plan import CONVERSIONS, Asked, Form, Step, forms, name_of
from hpcai_cli.engine.compression.table import open_form
from hpcai_cli.engine.reports import bootstrap
from hpcai_cli.engine.store import Dataset, Split, check_fits
from hpcai_cli.engine.task import task_of
from hpcai_cli.errors import DataError, UnsuitableError
from hpcai_cli.recipe import Recipe
from hpcai_cli.run import Run, write_json
from hpcai_cli.signals import StopRequest


def compress_run(run: Run, asked: Asked, *, data: Path | None, functions: Mapping[str, Callable | None],
                 stop: StopRequest, **settings) -> dict:
    """Compress a run in this process, one of several or alone, and return the report, the same on every rank.

    Args:
        functions: `augment` and `final_augment` of the run's recipe; `student_augment`, `student_final_augment` and
            `student_adapt`.
        settings: the other fields of Compression.

    Raises:
        DataError: the run has nothing to compress or no held-out data to judge by.
        StoppedEarly: a signal came; the same call goes on from there.
    """
    ranks, held = distributed.start(), []
    # Rank 0 looks first: what is wrong with run or data is said once, and by no rank that others wait for.
    distributed.on_rank_zero(ranks, lambda: held.append(_opened(run, data, settings["trust"])))
    dataset, recipe = held[0] if held else _opened(run, data, settings["trust"])
    hardware.set_up(local_rank=ranks.local_rank, local_size=ranks.local_size)
    hardware.set_precision(recipe.precision)
    if dataset.fingerprint != run.manifest().get("data_fingerprint"):
        console.note("the data are not those that the run was trained on")
    student = settings["student"] and dataclasses.replace(check_fits(dataset, settings["student"]),
                                                          precision=recipe.precision)
    bound = {name: function and partial(function, recipe=student if name.startswith("student") else recipe)
             for name, function in functions.items()}
    compression = Compression(run, recipe, dataset, ranks, stop=stop, **bound, **{**settings, "student": student})
    report = _Search(compression, asked).run()
    ranks.stop()
    return report


def _opened(run: Run, data: Path | None, trust: bool) -> tuple[Dataset, Recipe]:
    """Return the data and the recipe with what it leaves to them."""
    if run.tflite_file.is_file() and not run.model_file.is_file():
        raise DataError(f"{run.folder} holds a TFLite model, which can be made no smaller",
                        expected="a run with a model.keras", mend="give the run that it was made from",
                        received=str(run.folder))
    model_file.check(run.model_file, trust=trust)
    dataset = Dataset(data or run.data_file())
    return dataset, check_fits(dataset, run.recipe())


class _Search:
    """The forms that were tried, and what was found of each."""

    def __init__(self, compression: Compression, asked: Asked):
        self.compression, self.asked = compression, asked
        self.ranks, self.recipe, self.dataset = compression.ranks, compression.recipe, compression.dataset
        self.measure = "r2" if self.recipe.task == "regression" else "accuracy"
        # The test split is for confirming what was chosen on another one.
        self.splits = [name for name in ("validation", "test") if len(self.dataset.splits.get(name, ()))]
        if not self.splits:
            raise DataError("the data have no held-out split to judge a compressed model by",
                            expected="a validation or a test split",
                            mend="write them again with --test-fraction, or give others with --data",
                            received=str(self.dataset.path))
        self.searches = asked.max_drop is not None or asked.target is not None
        self.notes: list[str] = []
        self._known: dict[str, dict] = {}

    def run(self) -> dict:
        """Try the forms in their order and return the report."""
        tried: list[Form] = [(), *self._as_float(())]
        self._judge(())
        chosen, reasons = None, []
        for form in forms(self.asked):
            try:
                self.compression.make(form)
            except UnsuitableError as error:
                if not self.searches:
                    raise
                reasons.append(f"{name_of(form)} cannot be made ({error})")
                console.note(reasons[-1])
                continue
            self.compression.raise_if_stopped()
            tried.append(form)
            reason = self._why_not(form)
            if reason is None:
                chosen = form
                break
            reasons.append(f"{name_of(form)} {reason}")
            console.note(reasons[-1])
        if chosen is not None and reasons:
            self.notes.append(f"{'; '.join(reasons)}: {name_of(chosen)} is the first that holds")
        if chosen is not None:
            tried += self._as_float(chosen[:-1] if chosen[-1].kind in CONVERSIONS else chosen)
        return self._report(list(dict.fromkeys(tried)), chosen, reasons)

    def _report(self, tried: list[Form], chosen: Form | None, reasons: list[str]) -> dict:
        """Measure all forms side by side on rank 0, and write what was found into the chosen one's folder,
        or beside them all where none holds."""
        judged = {form: self._judge(form) for form in tried}
        split, compression = self.splits[-1], self.compression

        def measured() -> dict:
            rows = table.rows({form: self._folder(form) for form in tried}, self.recipe, self._examples(),
                              trust=compression.trust)
            for row, form in zip(rows, tried, strict=True):
                row |= {**judged[form][split], "drop": self._drop(form, split), "splits": judged[form]}
            report = {"schema": "hpcai.compress/1", "command": "compress", "run": str(compression.run.folder),
                      "metrics": {} if chosen is None else judged[chosen][split]["metrics"],
                      "chosen": None if chosen is None else str(self._folder(chosen)),
                      "measure": self.measure, "split": split, "max_drop": self.asked.max_drop, "forms": rows,
                      "notes": self.notes,
                      "failed": "" if chosen is not None else f"no form holds: {'; '.join(reasons)}"}
            failed = compression.run.compressed / "compression.json"
            failed.unlink(missing_ok=True)
            folder = failed.parent if chosen is None else self._folder(chosen)
            write_json(folder / "compression.json", report)
            table.draw(report, folder / "compression.png")
            return report

        return distributed.on_rank_zero(self.ranks, measured)

    def _as_float(self, network: Form) -> list[Form]:
        """Return a network as a float32 TFLite model, where it can become one: what a conversion alone gains is not
        the pruning's or the quantization's."""
        form = (*network, Step("float32"))
        try:
            self.compression.make(form)
        except UnsuitableError as error:
            console.note(str(error))
            return []
        return [form]

    def _judge(self, form: Form) -> dict:
        """Return the figures of a form by split, computed once."""
        name = name_of(form)
        if name not in self._known:
            folder = self._folder(form)
            opened, found = open_form(form, folder, trust=self.compression.trust), {}
            for split_name in self.splits:
                split = self.dataset.split(split_name)
                with console.progress(f"evaluating {name}", total=-(-len(split) // self.ranks.size),
                                      unit="examples") as shown:
                    scores = evaluation.scores_of(opened.forward, split, self.ranks,
                                                  columns=task_of(self.recipe).columns, on_batch=shown.update)
                if not np.isfinite(scores).all():
                    raise DataError(f"{folder} answers something that is no number", expected="finite scores")
                found[split_name] = self._figures(scores, split, Run(folder).decision_threshold())
            self._known[name] = found
        return self._known[name]

    def _figures(self, scores: np.ndarray, split: Split, threshold: float | None) -> dict:
        metrics = evaluation.figures(self.recipe, scores, split.labels, threshold)
        if self.measure not in metrics:
            raise DataError(f"{self.measure} has no value on these data", expected="labels that are not all the same",
                            received=str(self.dataset.path))
        statistic = bootstrap.weighted_figures(self.recipe, scores, split.labels, threshold)
        return {"metrics": metrics, "interval": bootstrap.intervals(statistic, len(split))[self.measure]}

    def _folder(self, form: Form) -> Path:
        return self.compression.run.compressed / name_of(form) if form else self.compression.run.folder

    def _drop(self, form: Form, split: str) -> float:
        before, after = (self._judge(each)[split]["metrics"][self.measure] for each in ((), form))
        return before - after

    def _why_not(self, form: Form) -> str | None:
        """Return why a form does not hold what was promised, None where it does."""
        if self.asked.target and (found := self._goal(form)) > self.asked.target.most:
            return f"has {self.asked.target.kind} {found:.4g} where {self.asked.target.most:.4g} is asked for"
        if self.asked.max_drop is not None:
            for split in self.splits:
                # A hair's breadth for the sum of two decimal fractions.
                if (lost := self._drop(form, split)) > self.asked.max_drop + 1e-9:
                    return f"loses {lost:.4f} of {self.measure} on the {split} split"
        return None

    def _goal(self, form: Form) -> float:
        target, cost = self.asked.target, table.cost
        if target.kind == "macs":
            folders = self._folder(form), self._folder(())
            after, before = (cost(folder, self.recipe, trust=self.compression.trust).macs for folder in folders)
            return after / before
        folder = self._folder(form)

        def measured() -> float:
            opened = open_form(form, folder, trust=self.compression.trust)
            if target.kind == "size":
                return inference_cost.file_sizes(opened.file)["bytes"]
            return inference_cost.latencies({"form": opened.forward}, self._examples())["form"]["1"]

        # One rank's clock decides for all.
        return distributed.on_rank_zero(self.ranks, measured)

    def _examples(self) -> np.ndarray:
        return np.array(self.dataset.split(self.splits[-1]).inputs[:32])
