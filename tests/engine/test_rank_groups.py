"""Which ranks share a model, and which hold the same part, as a launcher numbers them."""

import pytest

from hpcai_cli.engine import rank_groups
from hpcai_cli.errors import UsageError


@pytest.mark.parametrize(("size", "parts", "expected"), [
    (4, 2, [[0, 1], [2, 3], [0, 2], [1, 3]]), (6, 3, [[0, 1, 2], [3, 4, 5], [0, 3], [1, 4], [2, 5]]),
    # All of them are a group that is always there, and one rank is none.
    (2, 2, []), (4, 1, []), (5, 2, [])])
def test_groups_are_of_neighbors_and_of_every_so_manieth(monkeypatch, size, parts, expected):
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", str(size))
    assert rank_groups.groups(parts) == expected
    for group in expected:
        for rank in group:
            assert group in (rank_groups.sharing(rank, parts), rank_groups.alike(rank, parts, size))


def test_a_launcher_that_tells_no_number(monkeypatch):
    monkeypatch.setenv("PMIX_RANK", "1")
    with pytest.raises(UsageError, match="PMIx does not say how many processes.*start them with --np"):
        rank_groups.groups(2)
    assert rank_groups.groups(1) == []
