"""Versions of a model: numbered, one current, an earlier one again."""

import os

import pytest

from hpcai_cli.engine.deployment import repository
from hpcai_cli.errors import DataError, HpcaiError, UsageError


@pytest.fixture
def models(tmp_path):
    """Make a repository with the versions 1, 2 and 10, and things that are no versions."""
    for name in ("1", "2", "10", "03", "draft"):
        (tmp_path / "mnist" / name).mkdir(parents=True)
        (tmp_path / "mnist" / name / "artefact.json").touch()
    (tmp_path / "mnist" / "11").mkdir()
    return tmp_path / "mnist"


def test_versions_are_numbers_with_a_model(models):
    assert repository.current(models) == 10
    # A folder that holds a number already is never written into.
    assert repository.next_version(models).name == "12"
    assert repository.next_version(models.parent / "new").name == "1"


def test_back_and_to_a_version(models):
    assert repository.roll_back(models, None)["after"] == 2
    assert repository.current(models) == 2
    document = repository.roll_back(models, None)
    assert (document["before"], document["after"], document["versions"]) == (2, 1, [1, 2, 10])
    with pytest.raises(UsageError, match="there is no version before the current one"):
        repository.roll_back(models, None)
    assert repository.roll_back(models, 10)["after"] == 10
    with pytest.raises(UsageError, match=r"no such version; expected 1, 2, 10; received: 7"):
        repository.roll_back(models, 7)
    assert repository.current(models) == 10


@pytest.mark.parametrize("said", ["7", "../1", "", "1\n2"])
def test_a_current_version_that_is_not_there(models, said):
    (models / "current").write_text(said)
    with pytest.raises(DataError, match="names a version that is not there"):
        repository.current(models)


def test_no_repository(tmp_path):
    with pytest.raises(DataError, match="expected the folder of an export"):
        repository.roll_back(tmp_path / "nothing", None)


def test_one_export_has_no_versions(tmp_path):
    (tmp_path / "artefact.json").touch()
    with pytest.raises(UsageError, match="this is one export and no folder of versions"):
        repository.roll_back(tmp_path, None)


def test_delivery_replaces_as_a_whole(tmp_path):
    for name, content in (("made", "new"), ("target", "old")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(content)
    repository.deliver(tmp_path / "made", tmp_path / "target", force=True)
    assert (tmp_path / "target" / "file").read_text() == "new"
    assert os.listdir(tmp_path) == ["target"]


def test_a_failed_delivery_leaves_what_was_there(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "file").write_text("old")
    with pytest.raises(HpcaiError, match="what was there is unchanged"):
        repository.deliver(tmp_path / "missing", tmp_path / "target", force=True)
    assert (tmp_path / "target" / "file").read_text() == "old"
