"""The lines that rank 0 writes while a training runs, shown by the driver as they come."""

import json
import os
import threading
from pathlib import Path
from typing import Self, TextIO

from pipeline.console import Reporter

_INTERVAL_S = 0.5


class MetricsFollower:
    """Shows the lines of a metrics file from a thread until the block ends.

    Every start of the ranks replaces the file by one with the lines that its checkpoint kept
    (`training_worker.MetricsFile`), so a file of another identity is a start: the first one belongs
    to this training, each later one is a restart. The file read last stays open, which keeps its
    identity from being given away.
    """

    def __init__(self, path: Path, reporter: Reporter) -> None:
        self.path = path
        self.reporter = reporter
        self._file: TextIO | None = None
        self._lines: list[str] = []
        """Lines read of the open file."""
        self._starts = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Self:
        # An interrupted training's lines were shown when it wrote them.
        if self.path.exists():
            self._file = self.path.open()
            self._lines = self._file.readlines()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._file is not None:
            self._file.close()

    def _follow(self) -> None:
        ended = False
        while not ended:
            ended = self._stop.wait(_INTERVAL_S)
            self.show_new_lines()

    def show_new_lines(self) -> None:
        """Show what was written since the last call."""
        if self._was_replaced():
            self._reopen()
        elif self._starts:
            self._show(self._read())

    def _was_replaced(self) -> bool:
        if not self.path.exists():
            return False
        return self._file is None or not os.path.samestat(
            os.fstat(self._file.fileno()), self.path.stat()
        )

    def _reopen(self) -> None:
        before = self._lines
        if self._file is not None:
            self._file.close()
        self._file = self.path.open()
        self._lines = []
        self._starts += 1
        lines = self._read()
        kept = os.path.commonprefix([before, lines])
        if before or self._starts > 1:
            step = json.loads(kept[-1])["step"] if kept else 0
            start = "workers restarted" if self._starts > 1 else "resumed"
            self.reporter.line(f"  {start}; training goes on after step {step}")
        self._show(lines[len(kept) :])

    def _read(self) -> list[str]:
        """Whole lines that were added; half a line waits for its end."""
        assert self._file is not None
        lines = []
        position = self._file.tell()
        while (line := self._file.readline()).endswith("\n"):
            lines.append(line)
            position = self._file.tell()
        self._file.seek(position)
        self._lines += lines
        return lines

    def _show(self, lines: list[str]) -> None:
        for metrics in map(json.loads, lines):
            self.reporter.line(f"  {metrics['line']}")
            self.reporter.fill(metrics["rows"], metrics["total_rows"])
