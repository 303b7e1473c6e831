"""A bundle's requirements are what is installed, to the last package that a package needs."""

from importlib import metadata
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

from hpcai_cli.engine.deployment.bundle_requirements import EDGE_PACKAGES, LIBRARIES, SERVER_PACKAGES, pinned
from hpcai_cli.errors import MissingError


@pytest.fixture
def installed(monkeypatch):
    """Packages that need each other, in the place of what is installed."""
    packages = {"a": ("1.0", ["B.b>=1", "never; python_version < '3'", "only-extra; extra == 'more'"]),
                "b-b": ("2.1+local", ["a", "c[fast]>=2"]), "c": ("3", ["quick; extra == 'fast'"]), "quick": ("4", None)}

    def distribution(name):
        if name not in packages:
            raise metadata.PackageNotFoundError(name)
        return SimpleNamespace(version=packages[name][0], requires=packages[name][1])
    monkeypatch.setattr(metadata, "distribution", distribution)


def test_all_that_is_needed_is_pinned_once(installed):
    header, *lines = pinned(["A"]).splitlines()
    assert header.startswith("# As installed with Python 3.")
    assert lines == ["a==1.0", "b-b==2.1", "c==3", "quick==4"]


def test_an_extra_is_followed_where_it_is_asked_for(installed):
    assert "quick" not in pinned(["c"])
    with pytest.raises(MissingError, match="expected only-extra; run `pip install"):
        pinned(["a[more]"])


@pytest.mark.parametrize("kind", LIBRARIES)
def test_each_kind_has_its_library_and_no_other_kinds(kind):
    names = {Requirement(line).name for line in pinned((*SERVER_PACKAGES, *LIBRARIES[kind])).splitlines()[1:]}
    assert {*SERVER_PACKAGES, *LIBRARIES[kind], "click", "h11"} <= names
    others = {name for names in LIBRARIES.values() for name in names} - set(LIBRARIES[kind])
    assert not names & others and ("h5py" in names) == ("tensorflow" in names)
    assert "hpcai" not in names and "pandas" not in names


def test_a_small_device_needs_little():
    assert len(pinned((*EDGE_PACKAGES, *LIBRARIES["tflite"])).splitlines()) < 15
