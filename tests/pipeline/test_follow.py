"""The lines shown while a training runs: a restart is said once, and only when there was one."""

from pathlib import Path

import pytest

from pipeline.train import _following


class _Lines:
    def __init__(self) -> None:
        self.shown: list[str] = []

    def line(self, text: str) -> None:
        self.shown.append(text.strip())

    def fill(self, done: int, total: int) -> None:
        pass


@pytest.mark.parametrize(
    ("lines", "restarts_before"),
    [
        (["t50", "v60", "t100", "v100", "v120", "t120"], []),  # the last window ends with training
        (["t50", "v60", "t50", "v60", "t100"], [2]),
        (["t50", "v60", "v60", "t100"], [2]),
        (["t50", "t100", "v90", "t100"], [2]),
    ],
)
def test_a_restart_is_a_line_that_should_have_come_before(
    lines: list[str], restarts_before: list[int]
) -> None:
    reporter = _Lines()
    following = _following(Path("metrics.jsonl"), reporter)
    expected = []
    for index, line in enumerate(lines):
        metrics = {"step": int(line[1:]), "line": line, "rows": 0, "total_rows": 1}
        following._show(metrics | ({"validation/since_best": 0.0} if line[0] == "v" else {}))
        if index in restarts_before:
            expected.append(f"workers restarted; training goes on before {line[1:]}")
        expected.append(line)
    assert reporter.shown == expected
