"""What a checkpoint holds of how far training is."""

from dataclasses import replace

import torch

from embedding.epochs import Leg, Position
from ranking.clock import Totals
from ranking.progress import Progress
from ranking.validation import ValidationState


def test_only_rank_0_holds_what_all_ranks_know() -> None:
    of_all = Progress(
        step=7,
        position=Position(epoch=1).after(Leg(world_size=2, batch_size_per_rank=8, steps=3)),
        window_TX=torch.rand(2, 9, dtype=torch.float64),
        window_slots=112,
        window_penalty=0.25,
        validation=ValidationState(last_step=6, best_step=4, best_value=0.7, since_best=1),
        totals=Totals(rows=100),
    )
    other = replace(of_all, totals=Totals(rows=40))

    first, second = of_all.state_dict(0), other.state_dict(1)

    assert set(second) == {"totals"}
    for merged, expected in ((first, of_all), (first | second, other)):
        found = Progress.from_state_dict(merged)
        assert found.window_TX is not None
        assert found.window_TX.equal(of_all.window_TX)
        assert replace(found, window_TX=None) == replace(expected, window_TX=None)
