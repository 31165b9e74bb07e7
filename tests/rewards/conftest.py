"""Small weights of each reward, written once for all tests of this folder."""

from __future__ import annotations

import pytest
from backend import backends


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Name as in `backends()` -> options of the reward, and where its weights lie."""
    options: dict[str, dict] = {}
    known = backends()

    def make(name: str) -> dict:
        if name not in options:
            options[name] = known[name].make(tmp_path_factory.mktemp(name))
        return options[name]

    return make
