"""The one exception that means: the user must change something; and words for its sentences."""

import difflib
from collections.abc import Sequence


class UserError(ValueError):
    """A full sentence for the user: what is wrong, where, the value, and the remedy.

    The command line prints it without a traceback and exits with 2. It takes a single string, so
    it survives pickling between Ray processes.
    """


class CheckpointError(UserError):
    """The fault is a checkpoint's own: it is missing or damaged, or that of another model."""


def nearest_name(word: str, words: Sequence[str]) -> str:
    """A hint for a misspelt name, or nothing."""
    matches = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def not_among(
    word: str, what: str, words: Sequence[str], remedy: str = "add it or use one of them"
) -> str:
    """'itm' is not among the tables ['item', 'user']; did you mean 'item'? Else the remedy."""
    hint = nearest_name(word, words) or f"; {remedy}"
    return f"{word!r} is not among the {what} {[*words]}{hint}"
