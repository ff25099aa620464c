"""What alarms look at is told after each look at what is new."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from deploy.serving import service


class Metric:
    """Stands for Ray's."""

    def __init__(self, name: str, _: str) -> None:
        self.name = name

    def set(self, value: float) -> None:
        TOLD.append((self.name, value))

    inc = set


TOLD: list[tuple[str, float]] = []


def test_the_served_day_the_last_refresh_and_failures_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for kind in ("Gauge", "Counter"):
        monkeypatch.setattr(service, kind, Metric)
    model = SimpleNamespace(date="1970-01-03")
    live: Any = SimpleNamespace(now=SimpleNamespace(model=model), refreshed_s=9.0, num_failures=0)
    figures = service.RefreshFigures()
    TOLD.clear()

    figures.tell(cast("service.LiveModel", live))
    live.num_failures = 2
    figures.tell(cast("service.LiveModel", live))
    model.date = None
    figures.tell(cast("service.LiveModel", live))

    day, refreshed = "braid_serve_model_day_seconds", ("braid_serve_refreshed_seconds", 9)
    failures = "braid_serve_failed_refreshes"
    expected = [
        (day, 2 * 86_400),
        refreshed,
        (day, 2 * 86_400),
        refreshed,
        (failures, 2),
        refreshed,
    ]
    assert expected == TOLD
