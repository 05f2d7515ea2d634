"""The table of tests/mutations.py keeps up with the code. That each error turns a test red takes too long for here."""

import pytest

from tests.mutations import MUTATIONS, planted


@pytest.mark.parametrize("file", MUTATIONS)
def test_each_error_can_still_be_planted(file: str) -> None:
    for before, after in MUTATIONS[file][1]:
        planted(file, before, after)  # raises where the text has changed
