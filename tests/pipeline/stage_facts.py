"""Facts of stages that did not run; what a test does not name is of no interest to it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.codes.quantize_facts import Quantized, QuantizeFacts
from pipeline.event_files import DayFiles
from pipeline.gate_decision import GateDecision
from pipeline.registry import PublishFacts
from pipeline.samples.ingest_facts import IngestFacts
from pipeline.train_facts import TrainFacts, TrainResult

RESULT = TrainResult(
    checkpoint="step-00000010",
    rows=10,
    steps=10,
    best_step=None,
    stopped_early=False,
    rows_per_s=1.0,
    world_size=1,
    data_wait_share=0.0,
    warm_start=None,
)

NO_FILES = DayFiles(num_bytes=0, seen="", content="")


def trained(days: Sequence[str], parent: str | None = None, **others: Any) -> TrainFacts:
    return TrainFacts(
        **{
            "result": RESULT,
            "days": tuple(days),
            "codebooks": None,
            "event_columns": {},
            "parent": parent,
            "day_files": dict.fromkeys(days, NO_FILES),
            "caught_up": None,
            **others,
        }
    )


def ingested(
    days: Sequence[str],
    previous: str | None = None,
    first_day: str | None = None,
    root: Path | None = None,
) -> IngestFacts:
    """Of a span whose event files lie below `root`; None: in a test that looks at none."""
    return IngestFacts(
        days=tuple(days),
        previous=previous,
        day_files={} if root is None else {day: DayFiles.of(root, day) for day in days},
        rows_in=0,
        rows_out=0,
        quarantined={},
        rows_per_day={},
        labels={},
        mean_history_length={},
        num_items=0,
        num_users=0,
        num_buckets=1,
        first_day=first_day or days[0],
        event_columns={},
    )


def coded(done: Quantized, previous: str | None = None, **others: Any) -> QuantizeFacts:
    own = {"num_without_vector": 0, "settings": {}, "taken_from": None, **others}
    return QuantizeFacts(**dict(done), previous=previous, **own)


def decided(*reasons: str) -> GateDecision:
    return GateDecision(passed=not reasons, reasons=reasons, checks=(), compared_with=None)


def published(last_day: str) -> PublishFacts:
    return PublishFacts(training="train", learned_up_to=last_day, num_bytes=0)
