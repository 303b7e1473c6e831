"""The models that a server has, each in one or more versions, and their change while requests go on."""

import asyncio
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from hpcai_cli.engine.serving import memory, model_folders
from hpcai_cli.engine.serving.artefact import Artefact
from hpcai_cli.engine.serving.batching import Batcher, Bounds
from hpcai_cli.engine.serving.examples import check_encoding
from hpcai_cli.engine.serving.metrics import Metrics, Row
from hpcai_cli.engine.serving.settings import Settings
from hpcai_cli.engine.serving.statistics import Recorder, path_of
from hpcai_cli.engine.serving.tensors import RequestError
from hpcai_cli.engine.serving.warm_up import opened
from hpcai_cli.errors import DataError, HpcaiError, printable

_LETTING_GO_SECONDS = (1.0, 10.0)
"""After which nothing holds a version any more that another one has replaced: in most cases, and on a busy machine."""


@dataclass(eq=False)
class Version:
    """A version of a model that is open and answers."""

    artefact: Artefact
    version: str
    digest: str
    """SHA-256 of its artefact.json, which tells whether it has changed on disk."""
    batcher: Batcher
    recorder: Recorder


@dataclass(frozen=True)
class Model:
    """The versions of a model, and which one answers when none is named."""

    versions: Mapping[str, Version]
    current: str


@dataclass
class Place:
    """What a server knows of itself beside its settings: who it is among the workers, and what others have tried."""

    state: Path
    slot: int
    metrics: Metrics
    proven: set[str] = field(default_factory=set)
    """Digests of exports that were opened before, with all checks: another worker need not try them out again."""


class Models:
    """Loads models, finds them by name and version, and changes them for what is newer on disk."""

    def __init__(self, folders: Mapping[str, Path], settings: Settings, place: Place):
        self._folders, self._settings, self._place = folders, settings, place
        self._models: Mapping[str, Model] = {}
        self._changing = asyncio.Lock()

    def __iter__(self):
        """Yield name and model."""
        return iter(self._models.items())

    def __len__(self) -> int:
        return len(self._models)

    def __contains__(self, name: str) -> bool:
        return name in self._models

    def find(self, name: str, version: str | None = None) -> Version:
        """Return a version of a model, the current one where none is named.

        Raises:
            RequestError: 404 there is no such model or version.
        """
        model = self._models.get(name)
        if model is None:
            raise RequestError(404, f"there is no model {printable(name[:100])!r}; expected "
                               f"{' or '.join(list(self._models)[:8])}")
        found = model.versions.get(model.current if version is None else version)
        if found is None:
            raise RequestError(404, f"the model {name!r} has no version {printable(version[:20])!r}; expected "
                               f"{' or '.join(list(model.versions)[:8])}")
        return found

    def model(self, name: str) -> Model:
        """Return all versions of a model.

        Raises:
            RequestError: 404 there is no such model.
        """
        self.find(name)
        return self._models[name]

    def load(self, *, strict: bool) -> list[str]:
        """Open all models before the server answers.

        Args:
            strict: whether a version that cannot be opened is an error; else it is left out where another one is there.

        Returns:
            What was left out and why.

        Raises:
            HpcaiError: a model cannot be served.
        """
        self._models, problems = self._found(strict)
        return problems

    async def reload(self) -> list[str]:
        """Open what is new or has changed on disk beside what is there, then change over at once.

        Requests that the old ones have taken are finished by them. Return what could not be loaded and why.
        """
        async with self._changing:
            loop = asyncio.get_running_loop()
            found, problems = await loop.run_in_executor(None, self._found, False)
            before = {id(one): one for _, model in self for one in model.versions.values()}
            # One assignment: every request sees all of the old models or all of the new ones.
            self._models = found
            for _, model in self:
                for one in model.versions.values():
                    before.pop(id(one), None)
            for one in before.values():
                one.batcher.retire()
            for seconds in _LETTING_GO_SECONDS if before else ():
                loop.call_later(seconds, loop.run_in_executor, None, memory.give_back)
        return problems

    # ---- Loading ---------------------------------------------------------------------------------------------------

    def _found(self, strict: bool) -> tuple[dict[str, Model], list[str]]:
        found, problems = {}, []
        for name, folder in self._folders.items():
            old = self._models.get(name)
            try:
                found[name] = self._model(name, folder, old, strict, problems)
            except HpcaiError as error:
                if old is None:
                    raise
                problems.append(f"model {name}: {error}")
                found[name] = old
        return found, problems

    def _model(self, name: str, folder: Path, old: Model | None, strict: bool, problems: list[str]) -> Model:
        places, versions = model_folders.versions(folder), {}
        for version, place in places.items():
            known = old.versions.get(version) if old else None
            try:
                digest = model_folders.digest(place)
                same = known is not None and known.digest == digest
                versions[version] = known if same else self._open(name, version, place, digest)
            except HpcaiError as error:
                if strict:
                    raise
                problems.append(f"model {name}, version {version}: {error}")
                if known is not None:
                    versions[version] = known
        if not versions:
            raise DataError("none of its versions can be loaded", received=str(folder))
        try:
            current = model_folders.current(folder, versions)
        except HpcaiError as error:
            if strict:
                raise
            problems.append(f"model {name}: {error}")
            current = old.current if old and old.current in versions else max(versions, key=int)
        return Model(versions, current)

    def _open(self, name: str, version: str, folder: Path, digest: str) -> Version:
        artefact = Artefact.open(folder)
        artefact.verify()
        check_encoding(artefact)
        artefact = replace(artefact, document={**artefact.document, "name": name})
        settings, row = self._settings, self._place.metrics.row(name)
        threads = settings.threads or max(1, (os.cpu_count() or 1) // settings.workers)
        warm = opened(artefact, threads=threads, trust=settings.trust, tried=digest in self._place.proven,
                      max_batch=settings.max_batch)
        self._place.proven.add(digest)
        recorder = Recorder(artefact, path_of(artefact, self._place.state, self._place.slot))
        bounds = Bounds(warm.batch, settings.max_delay if warm.batch > 1 else 0.0, settings.timeout)
        batcher = Batcher(warm.scores, artefact.columns, bounds, warm.cost, _recorded(recorder, row))
        return Version(artefact, version, digest, batcher, recorder)


def _recorded(recorder: Recorder, row: Row) -> Callable[[np.ndarray, np.ndarray], None]:
    """Return what counts a batch; its failure is told once, and fails no request."""
    failures = []

    def ran(inputs: np.ndarray, scores: np.ndarray) -> None:
        row.batch(len(inputs))
        try:
            recorder.record(inputs, scores)
        except Exception as error:
            if not failures:
                failures.append(type(error))
                print(f"statistics: {type(error).__name__}: {printable(str(error))}", file=sys.stderr, flush=True)
    return ran
