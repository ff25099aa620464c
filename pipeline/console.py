"""What the user sees while stages run: bars on a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_INTERVAL_S = 5.0
QUIET_S = 2.0
WIDTH_OF_PIPES = 100_000
"""Wider than any line: what a program reads is neither cut nor folded."""


def result_console() -> Console:
    """Where a command prints the table that it was asked for."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH_OF_PIPES
    return console


class Reporter:
    """Progress of the stage that runs now, with rate and remaining time."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._name = ""
        self._unit = "rows"
        self._started = 0.0
        self._last_line = 0.0

    @contextmanager
    def stage(self, name: str, unit: str = "rows") -> Iterator[None]:
        """Show `name` as running until the block ends."""
        self._name, self._unit = name, unit
        self._started = self._last_line = time.monotonic()
        if not self.console.is_terminal:
            yield
            return
        columns = (
            SpinnerColumn(),
            TextColumn("[bold]{task.description:<9}"),
            BarColumn(bar_width=28),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            self._progress = progress
            self._task = progress.add_task(name, total=None, rate="")
            try:
                yield
            finally:
                self._progress = self._task = None

    def advance(self, done: int, total: int) -> None:
        """`done` of `total` units are finished: moves the bar, or prints a line now and then."""
        now = time.monotonic()
        elapsed = max(now - self._started, 1e-9)
        if self._progress is not None:
            self.fill(done, total)
        elif elapsed > QUIET_S and now - self._last_line >= LINE_INTERVAL_S:
            self._last_line = now
            left = elapsed * (total - done) / max(done, 1)
            self.line(
                f"  {self._name:<9} {done / max(total, 1):4.0%} | "
                f"{human(done / elapsed)} {self._unit}/s | eta {duration(left)}"
            )

    def fill(self, done: int, total: int) -> None:
        """Moves the bar only, for stages whose own lines say the rest."""
        if self._progress is not None and self._task is not None:
            elapsed = max(time.monotonic() - self._started, 1e-9)
            rate = f"{human(done / elapsed)} {self._unit}/s"
            self._progress.update(self._task, completed=done, total=total, rate=rate)

    def line(self, text: str) -> None:
        """Print one line above the bar."""
        self.console.print(text, soft_wrap=True)

    def warn(self, sentences: Iterable[str]) -> tuple[str, ...]:
        """Print what the stage that runs does not stop for; returns it, for its output."""
        shown = tuple(sentences)
        for sentence in shown:
            self.line(f"  [yellow]warning[/] {escape(sentence)}")
        return shown


def human(number: float) -> str:
    """1234567 -> 1.23M."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(number) >= limit:
            scaled = number / {"G": 1e9, "M": 1e6, "k": 1e3}[suffix]
            return f"{scaled:.3g}{suffix}"
    return f"{number:.0f}" if abs(number) >= 10 else f"{number:.3g}"


def size(num_bytes: float) -> str:
    """Bytes in binary units."""
    for limit, unit in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB")):
        if num_bytes >= limit:
            return f"{num_bytes / limit:.2f} {unit}"
    return f"{num_bytes / 1024:.1f} KiB" if num_bytes else "0"


def figure(value: float | None) -> str:
    """A metric with four decimals, or a dash."""
    return "-" if value is None else f"{value:.4f}"


def duration(seconds: float) -> str:
    """3723 -> 1h02m."""
    if seconds < 60:
        return f"{seconds:.1f}s" if seconds < 10 else f"{seconds:.0f}s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"
