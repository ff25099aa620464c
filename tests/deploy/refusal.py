"""A command that refuses: one sentence on stderr, exit code 2."""

import pytest


def refused(capsys: pytest.CaptureFixture[str], code: int) -> str:
    """The sentence of a command that ended with `code`."""
    printed = capsys.readouterr().err.strip()
    assert code == 2, printed
    assert printed.startswith("error: ")
    assert len(printed.splitlines()) == 1
    return printed
