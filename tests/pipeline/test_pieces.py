"""Pieces of work on actors: each is done once, whatever dies, and nothing stays behind."""

import os
import time
from functools import partial
from pathlib import Path

import pytest

from embedding.errors import UserError
from pipeline.pieces import stream_pieces
from tests.pipeline.cluster_tasks import squares

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("shared_ray")]

ONE = {"CPU": 1.0, "GPU": 0.0}


def is_gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


def test_every_piece_is_done_once_and_no_actor_is_left(tmp_path: Path) -> None:
    pieces = [0, 1, 2, 4, 5, 6]
    found = dict(stream_pieces(partial(squares, tmp_path), pieces, asked=ONE, num_actors=2))

    assert found == dict(enumerate(piece * piece for piece in pieces))
    loads = [int(path.name[5:]) for path in tmp_path.glob("load-*")]
    # One actor died and was started again; none loads for each of its pieces.
    assert 2 <= len(loads) <= 3
    deadline = time.monotonic() + 20
    while not all(map(is_gone, loads)):
        assert time.monotonic() < deadline, "a process holds its memory when the work is done"
        time.sleep(0.1)


def test_a_fault_of_the_user_keeps_its_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^piece 3 is not sound$"):
        list(stream_pieces(partial(squares, tmp_path), [2, 3], asked=ONE, num_actors=1))


def test_nothing_to_do_starts_nothing(tmp_path: Path) -> None:
    assert not list(stream_pieces(partial(squares, tmp_path), [], asked=ONE, num_actors=1))
    assert not list(tmp_path.iterdir())
