"""Errors: the exit code of each, and a message that says what and how to mend it."""

from __future__ import annotations

import pytest

from demerge import errors

CODES = {
    "DemergeError": 1,
    "UsageError": 2,
    "InputError": 3,
    "ResourceError": 4,
    "NumericalError": 5,
    "ComparisonError": 6,
    "Preempted": 75,
}


@pytest.mark.parametrize("name", CODES)
def test_exit_codes(name):
    kind = getattr(errors, name)
    assert kind.exit_code == CODES[name]
    assert issubclass(kind, errors.DemergeError)
    assert name in errors.__doc__


def test_no_error_is_without_a_code():
    found = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception)
    }
    assert found == set(CODES)


def test_the_text_holds_what_and_fix():
    error = errors.InputError("a.png: empty file", fix="remove it")
    assert str(error) == "a.png: empty file\n  fix: remove it"
    assert str(errors.InputError("a.png: empty file")) == "a.png: empty file"
