"""The lines shown while a training runs: each once, and a restart is said when there was one."""

import json
from pathlib import Path

from pipeline.follow import MetricsFollower


class _Lines:
    def __init__(self) -> None:
        self.shown: list[str] = []

    def line(self, text: str) -> None:
        self.shown.append(text.strip())

    def fill(self, done: int, total: int) -> None:
        pass


def record(step: int, name: str) -> str:
    return json.dumps({"step": step, "line": name, "rows": step, "total_rows": 9}) + "\n"


def start_with(path: Path, *lines: str) -> None:
    new = path.with_suffix(".new")
    new.write_text("".join(lines))
    new.replace(path)


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def test_lines_are_shown_once_and_only_when_whole(tmp_path: Path) -> None:
    path, reporter = tmp_path / "metrics.jsonl", _Lines()
    follower = MetricsFollower(path, reporter)
    follower.show_new_lines()
    start_with(path)
    follower.show_new_lines()
    append(path, record(5, "a") + record(10, "b")[:7])
    follower.show_new_lines()
    assert reporter.shown == ["a"]
    append(path, record(10, "b")[7:])
    follower.show_new_lines()
    follower.show_new_lines()
    assert reporter.shown == ["a", "b"]


def test_a_restart_is_said_even_when_the_file_has_outgrown_the_old_one(tmp_path: Path) -> None:
    path, reporter = tmp_path / "metrics.jsonl", _Lines()
    follower = MetricsFollower(path, reporter)
    start_with(path, record(5, "a"), record(10, "b"), record(15, "c"))
    follower.show_new_lines()
    start_with(path, record(5, "a"), record(10, "b"))
    append(path, record(15, "another c") + record(20, "d"))
    follower.show_new_lines()
    restarted = "workers restarted; training goes on after step 10"
    assert reporter.shown == ["a", "b", "c", restarted, "another c", "d"]


def test_a_restart_before_the_first_checkpoint_goes_on_after_step_0(tmp_path: Path) -> None:
    path, reporter = tmp_path / "metrics.jsonl", _Lines()
    follower = MetricsFollower(path, reporter)
    start_with(path)
    follower.show_new_lines()
    start_with(path)
    follower.show_new_lines()
    assert reporter.shown == ["workers restarted; training goes on after step 0"]


def test_an_interrupted_training_s_lines_are_not_shown_again(tmp_path: Path) -> None:
    path, reporter = tmp_path / "metrics.jsonl", _Lines()
    start_with(path, record(5, "a"), record(10, "b"), record(15, "c"))
    with MetricsFollower(path, reporter):
        start_with(path, record(5, "a"), record(10, "b"))
        append(path, record(15, "another c"))
    assert reporter.shown == ["resumed; training goes on after step 10", "another c"]
