"""One clear line of every error."""

import pytest

from hwpq_pipeline.errors import HwpqError, first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("no such architecture\nTraceback follows"), "no such architecture"),
        (ValueError("\nonly below"), "ValueError"),
        (KeyError(), "KeyError"),
    ],
)
def test_first_line_always_says_something(error, line):
    assert first_line(error) == line


def test_an_error_is_one_line_of_where_what_and_remedy():
    error = HwpqError("unknown\nname", where="parameters.yml:3", remedy="Use another.")
    assert str(error) == "parameters.yml:3: unknown name. Use another."
