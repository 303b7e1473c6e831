"""Models and versions from folders: what answers, what is refused, and what changes while others ask."""

import asyncio
import json
import shutil

import numpy as np
import pytest

from hpcai_cli.engine.serving.metrics import Metrics
from hpcai_cli.engine.serving.model_folders import named
from hpcai_cli.engine.serving.models import Models, Place
from hpcai_cli.engine.serving.settings import Settings
from hpcai_cli.engine.serving.tensors import RequestError
from hpcai_cli.errors import DataError, UsageError


@pytest.fixture
def models(tmp_path):
    """Return what makes the models of folders, not yet loaded."""
    def make(*words, trust: bool = True, **settings) -> Models:
        folders = named([str(word) for word in words])
        state = tmp_path / "state"
        state.mkdir(exist_ok=True)
        return Models(folders, Settings(tuple(folders), trust=trust, **settings),
                      Place(state, 0, Metrics(list(folders), state, 0)))
    return make


def seed_of(kit, models: Models, name: str = "tiny", version: str | None = None) -> int:
    """Return which of the tiny models answers."""
    pictures = kit.images(3)
    scores = asyncio.run(models.find(name, version).batcher.scores(pictures))
    chances = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    return next(seed for seed in (1, 2) if np.allclose(chances, kit.expected(pictures, seed), atol=1e-5))


# ---- Folders -------------------------------------------------------------------------------------------------------

def test_an_export_is_version_1_under_its_own_name_or_another(exports, kit, models, tmp_path):
    exports.write(tmp_path / "export")
    for words, name in (([tmp_path / "export"], "tiny"), ([f"else={tmp_path / 'export'}"], "else")):
        found = models(*words)
        assert found.load(strict=True) == []
        assert found.find(name) is found.find(name, "1") and found.find(name).artefact.name == name
        assert seed_of(kit, found, name) == 1


def test_of_a_repository_the_highest_version_answers_or_the_one_that_current_names(exports, kit, models, tmp_path):
    for version, kind in (("2", "tiny"), ("10", "other"), ("x", "slow"), ("03", "slow")):
        exports.write(tmp_path / "all" / version, kind)
    (tmp_path / "all" / "11").mkdir()
    found = models(tmp_path / "all")
    found.load(strict=True)
    assert list(found.model("tiny").versions) == ["2", "10"]
    assert [seed_of(kit, found, version=version) for version in ("2", "10", None)] == [1, 2, 2]
    (tmp_path / "all" / "current").write_text("2\n")
    assert asyncio.run(found.reload()) == []
    assert seed_of(kit, found) == 1


def test_a_folder_of_models_is_all_of_them(exports, models, tmp_path):
    exports.write(tmp_path / "all" / "one" / "1")
    exports.write(tmp_path / "all" / "two", "shop")
    (tmp_path / "all" / "notes").mkdir()
    found = models(tmp_path / "all")
    found.load(strict=True)
    assert [name for name, _ in found] == ["one", "two"]


def test_what_is_no_model_is_refused(exports, tmp_path):
    export = exports.write(tmp_path / "export")
    for words, kind in (([tmp_path / "nothing"], DataError), ([tmp_path], None), ([], UsageError),
                        ([export, f"tiny={export}"], UsageError)):
        if kind is None:
            assert list(named(map(str, words))) == ["export"]
            continue
        with pytest.raises(kind):
            named([str(word) for word in words])


def test_names_and_versions_that_are_not_there(exports, models, tmp_path):
    found = models(exports.write(tmp_path / "export"))
    found.load(strict=True)
    for name, version in (("else", None), ("tiny", "2"), ("tiny", ""), ("", None), ("tiny\n\x1b[2J", None)):
        with pytest.raises(RequestError) as caught:
            found.find(name, version)
        assert caught.value.status == 404 and caught.value.message.isprintable()


# ---- Loading -------------------------------------------------------------------------------------------------------

def test_a_changed_file_is_not_served(exports, models, tmp_path):
    export = exports.write(tmp_path / "export")
    content = bytearray((export / "model.tflite").read_bytes())
    content[-1] ^= 1
    (export / "model.tflite").write_bytes(content)
    with pytest.raises(DataError, match="is not the file that was exported"):
        models(export).load(strict=True)


def test_a_model_with_other_classes_than_it_says_is_not_served(exports, models, tmp_path):
    with pytest.raises(DataError, match="gives other outputs"):
        models(exports.write(tmp_path / "export", class_names=["a", "b", "c", "d"])).load(strict=True)


def test_a_worker_that_comes_later_leaves_out_what_is_broken(exports, kit, models, tmp_path):
    exports.write(tmp_path / "all" / "1")
    broken = exports.write(tmp_path / "all" / "2", "other")
    (broken / "model.tflite").write_bytes(b"nothing")
    with pytest.raises(DataError):
        models(tmp_path / "all").load(strict=True)
    found = models(tmp_path / "all")
    problems = found.load(strict=False)
    assert len(problems) == 1 and problems[0].startswith("model tiny, version 2: ")
    assert seed_of(kit, found) == 1


def test_what_another_worker_has_tried_is_not_tried_again(exports, models, tmp_path, monkeypatch):
    tried = []
    monkeypatch.setattr("hpcai_cli.engine.serving.sandbox.try_out", lambda *given: tried.append(given))
    found = models(exports.write(tmp_path / "export"), trust=False)
    found.load(strict=True)
    again = models(tmp_path / "export", trust=False)
    again._place.proven |= found._place.proven
    again.load(strict=True)
    assert len(tried) == 1


# ---- Reloading -----------------------------------------------------------------------------------------------------

def test_a_new_version_a_changed_one_and_a_removed_one(exports, kit, models, tmp_path):
    exports.write(tmp_path / "all" / "1")
    found = models(tmp_path / "all")
    found.load(strict=True)
    first = found.find("tiny")
    exports.write(tmp_path / "all" / "2", "other")
    assert asyncio.run(found.reload()) == []
    assert (seed_of(kit, found), found.find("tiny", "1")) == (2, first)
    exports.write(tmp_path / "all" / "1", "other")
    shutil.rmtree(tmp_path / "all" / "2")
    assert asyncio.run(found.reload()) == []
    assert seed_of(kit, found) == 2 and found.find("tiny") is not first
    with pytest.raises(RequestError):
        found.find("tiny", "2")


@pytest.mark.parametrize("damage", ["file", "document", "current", "all"])
def test_what_cannot_be_loaded_leaves_the_old_one_in_service(exports, kit, models, tmp_path, damage):
    exports.write(tmp_path / "all" / "1")
    found = models(tmp_path / "all")
    found.load(strict=True)
    if damage == "file":
        exports.write(tmp_path / "all" / "2", "other")
        (tmp_path / "all" / "2" / "model.tflite").unlink()
    elif damage == "document":
        (tmp_path / "all" / "1" / "artefact.json").write_text(json.dumps({"schema": "else"}))
    elif damage == "current":
        (tmp_path / "all" / "current").write_text("7")
    else:
        shutil.rmtree(tmp_path / "all")
    problems = asyncio.run(found.reload())
    assert len(problems) == 1 and problems[0].startswith("model tiny")
    assert seed_of(kit, found) == 1 and found.find("tiny").version == "1"


def test_requests_that_the_old_one_has_taken_are_finished_by_it(exports, kit, models, tmp_path):
    async def scenario():
        pictures = kit.images(200)
        old = found.find("tiny")
        taken = [asyncio.ensure_future(old.batcher.scores(pictures[place:place + 1])) for place in range(200)]
        await found.reload()
        assert found.find("tiny") is not old
        # Who found the old one before the change may ask it after.
        late = await old.batcher.scores(pictures)
        np.testing.assert_allclose(np.concatenate(await asyncio.gather(*taken)), late, rtol=1e-5)
    exports.write(tmp_path / "all" / "1")
    found = models(tmp_path / "all", max_batch=4)
    found.load(strict=True)
    exports.write(tmp_path / "all" / "1", "other")
    kit.run(scenario())
