"""Trials side by side: which processes run them, and that none outlives an interrupt.

Ray is a stand-in but for the last tests.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import psutil
import pytest
import ray

from embedding.errors import UserError
from pipeline.artifacts import StageFacts
from pipeline.cluster import Bundle
from pipeline.config import Recipe
from pipeline.stages import StageOutput, StageSpec
from pipeline.study import runner as study_trials
from pipeline.study import study as study_module
from pipeline.study.runner import Outcome, Trial, TrialProcesses
from pipeline.study.study import Study
from tests.pipeline.cluster_tasks import WithActor
from tests.pipeline.small_log import make_recipe

Run = Callable[[str], StageOutput | Exception]
"""What a process does with a trial: returns, or raises what is returned."""
DONE = StageOutput(1, 1, StageFacts())
SLOT: list[Bundle] = [{"CPU": 1.0}, {"CPU": 1.0}]


class Process:
    """An actor that came, or that is still to come."""

    def __init__(self, cluster: "Cluster") -> None:
        self.cluster = cluster
        self.came: Future[None] = Future()
        self.calls: list[Future[StageOutput]] = []
        self.is_killed = False
        warm = SimpleNamespace(future=lambda: self.came)
        self.warm_up = SimpleNamespace(remote=lambda *_: warm)
        self.run = SimpleNamespace(remote=self._run)

    def _run(self, trial: str) -> Future[StageOutput]:
        call: Future[StageOutput] = Future()
        self.calls.append(call)
        if self.is_killed:
            call.set_exception(RuntimeError("the actor died"))
        else:
            Thread(target=self._work, args=(trial, call), daemon=True).start()
        return call

    def _work(self, trial: str, call: Future[StageOutput]) -> None:
        _end(call, self.cluster.run(trial))


class Cluster:
    """As much of Ray as a study uses; has room for some processes, the others wait."""

    def __init__(self, room: int, run: Run) -> None:
        self.room, self.run = room, run
        self.started: list[Process] = []
        self.held: list[list[Bundle]] = []
        """Placement groups that are not removed."""

    def placement_group(self, bundles: list[Bundle]) -> list[Bundle]:
        self.held.append(bundles)
        return bundles

    def remove_placement_group(self, group: list[Bundle]) -> None:
        self.held.remove(group)

    def remote(self, _: type) -> Any:
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._start))

    def get(self, call: Future[StageOutput]) -> StageOutput:
        return call.result()

    def kill(self, process: Process) -> None:
        process.is_killed = True
        for call in process.calls:
            _end(call, RuntimeError("the actor died"))
        self._place()

    def available_resources(self) -> dict[str, float]:
        return {"CPU": float(self.room - len(self.placed))}

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 16.0}

    @property
    def placed(self) -> list[Process]:
        return [one for one in self.started if one.came.done() and not one.is_killed]

    def _start(self) -> Process:
        process = Process(self)
        self.started.append(process)
        self._place()
        return process

    def _place(self) -> None:
        for process in self.started:
            if len(self.placed) < self.room and not (process.came.done() or process.is_killed):
                process.came.set_result(None)


def _end(call: Future[StageOutput], result: StageOutput | Exception) -> None:
    if call.done():
        return
    if isinstance(result, Exception):
        call.set_exception(result)
    else:
        call.set_result(result)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    cluster = {"num_workers": 1}
    return Recipe.model_validate(make_recipe(tmp_path).model_dump() | {"cluster": cluster})


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Cluster]:
    def make(room: int, run: Run = lambda trial: DONE) -> Cluster:
        made = Cluster(room, run)
        monkeypatch.setattr(study_trials, "ray", made)
        for name in ("placement_group", "remove_placement_group"):
            monkeypatch.setattr(study_trials, name, getattr(made, name))
        for name in ("available_resources", "cluster_resources"):
            monkeypatch.setattr(ray, name, getattr(made, name))
        return made

    return make


@pytest.fixture
def trials(tmp_path: Path, recipe: Recipe) -> list[Trial]:
    """Trials `a/0` .. `a/3`, which a process is given by their names."""

    def trial(seed: int) -> Trial:
        job = Mock()
        job.model_dump_json.return_value = f"a/{seed}"
        spec = StageSpec("trial", tmp_path / "trials" / str(seed), {}, {}, Mock())
        return Trial("a", seed, recipe, lambda scratch: job, spec)

    return [trial(seed) for seed in range(4)]


def run(trials: list[Trial], at_once: int, lines: list[str] | None = None) -> list[Outcome]:
    say = Mock() if lines is None else lines.append
    with TrialProcesses([trials[0].recipe], SLOT) as processes:
        return list(processes.outcomes(trials, at_once, say))


def test_a_study_goes_on_with_the_processes_that_came(
    cluster: Callable[..., Cluster], trials: list[Trial]
) -> None:
    """Beside another job it waited for all of them, for ever."""
    made = cluster(room=1)

    outcomes = run(trials, at_once=3)

    assert [outcome.trial.seed for outcome in outcomes] == [0, 1, 2, 3]
    assert all(outcome.record is not None for outcome in outcomes)
    assert len(made.started) == 3
    assert all(process.is_killed for process in made.started)
    assert not made.held


def test_processes_that_have_nothing_left_to_do_are_given_back(
    cluster: Callable[..., Cluster], trials: list[Trial]
) -> None:
    given_back_in_time: list[bool] = []

    def work(trial: str) -> StageOutput:
        if trial == "a/3":  # the last one: it goes on until it is alone
            deadline = time.monotonic() + 10
            while len(made.placed) > 1 and time.monotonic() < deadline:
                time.sleep(0.01)
            given_back_in_time.append(len(made.placed) == 1)
        return DONE

    made = cluster(room=2, run=work)

    assert len(run(trials, at_once=3)) == 4

    assert given_back_in_time == [True]
    assert [process.came.done() for process in made.started] == [True, True, False]


def test_an_interrupt_ends_the_processes_and_starts_no_others(
    cluster: Callable[..., Cluster], trials: list[Trial]
) -> None:
    """Threads of killed trials took that for a broken process and began to start new ones."""

    def work(trial: str) -> StageOutput:
        if trial != "a/0":
            time.sleep(30)
        return DONE

    made = cluster(room=2, run=work)
    processes = TrialProcesses([trials[0].recipe], SLOT)

    def interrupted() -> None:
        with processes:
            for _ in processes.outcomes(trials, 2):
                raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        interrupted()

    assert time.monotonic() - began < 10
    assert len(made.started) == 2
    assert all(process.is_killed for process in made.started)
    assert all(future.done() for future in processes._running)


def test_a_study_that_no_process_comes_for_says_so_and_ends(
    cluster: Callable[..., Cluster], trials: list[Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster(room=0)
    monkeypatch.setattr(study_trials, "POLL_S", 0.01)
    patient = trials[0].recipe.cluster.model_copy(update={"wait_timeout_s": 0.1})
    trials = [replace(t, recipe=t.recipe.model_copy(update={"cluster": patient})) for t in trials]
    lines: list[str] = []

    with pytest.raises(
        UserError, match=r"no process .*needs 2 x .1 CPU., and free are 0 of 16 CPUs"
    ):
        run(trials, at_once=2, lines=lines)

    assert lines[0].startswith(
        "  no trial runs: a trial needs 2 x (1 CPU), and free are 0 of 16 CPUs"
    )


@pytest.mark.parametrize(
    ("error", "is_kept"),
    [(UserError("lower the rates"), True), (RuntimeError("CUDA error: an illegal access"), False)],
)
def test_a_process_is_replaced_after_any_error_but_the_users(
    cluster: Callable[..., Cluster], trials: list[Trial], error: Exception, is_kept: bool
) -> None:
    def work(trial: str) -> StageOutput | Exception:
        return error if trial == "a/0" else DONE

    made = cluster(room=1, run=work)

    outcomes = run(trials, at_once=1)

    assert [outcome.error for outcome in outcomes] == [error, None, None, None]
    assert len(made.started) == (1 if is_kept else 2)


def test_a_process_that_does_not_start_ends_a_study_only_if_it_is_alone(
    cluster: Callable[..., Cluster], trials: list[Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = cluster(room=2)
    start, broken = made._start, ImportError("libcuda")

    def start_first_broken() -> Process:
        if made.started:
            return start()
        made.started.append(process := Process(made))
        process.came.set_exception(broken)
        return process

    monkeypatch.setattr(made, "_start", start_first_broken)
    assert len(run(trials, at_once=2)) == 4

    made.started.clear()
    with pytest.raises(ImportError, match="libcuda"):
        run(trials, at_once=1)


@pytest.mark.parametrize(("max_parallel", "expected"), [(None, 4), (2, 2), (9, 4)])
def test_a_study_takes_no_more_of_the_cluster_than_it_may(
    cluster: Callable[..., Cluster],
    trials: list[Trial],
    monkeypatch: pytest.MonkeyPatch,
    max_parallel: int | None,
    expected: int,
) -> None:
    made = cluster(room=16)
    monkeypatch.setattr(study_module, "ray", made)
    study = object.__new__(Study)
    study.first, study.recipes = trials[0].recipe, {"a": trials[0].recipe}
    study.trials_per_gpu, study.max_parallel, study._actors = 1, max_parallel, []
    study.reporter = Mock()

    assert len(list(study._outcomes(trials, Mock()))) == 4

    assert len(made.started) == expected


@pytest.mark.usefixtures("shared_ray")
def test_no_trial_takes_the_room_of_anothers_actors(
    trials: list[Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks filled a Ray of two CPUs, and both waited for their actors."""
    monkeypatch.setattr(study_trials, "TrialProcess", WithActor)

    outcomes = run(trials[:2], at_once=2)

    assert [outcome.error for outcome in outcomes] == [None, None]


SMALL = [
    "data.synthetic.num_days=3",
    "data.synthetic.events_per_day=3000",
    "data.synthetic.num_items=100",
    "data.synthetic.num_users=200",
    "ranking.trainer.epochs=500",
]


@pytest.mark.integration
@pytest.mark.parametrize("num_workers", [1, 2], ids=["processes", "groups"])
def test_one_interrupt_ends_a_study_with_130_and_leaves_no_process(
    tmp_path: Path, num_workers: int
) -> None:
    (tmp_path / "variants.yaml").write_text("a: []")
    code = "import sys; from deploy.app import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "study", "--recipe", "demo", "--seeds", "3"]
    command += ["--variants", str(tmp_path / "variants.yaml"), "--out", str(tmp_path / "out")]
    settings = (f"data.root={tmp_path / 'data'}", f"cluster.num_workers={num_workers}", *SMALL)
    command += [f"--set={setting}" for setting in settings]
    log = tmp_path / "output.txt"
    with log.open("w") as output:
        driver = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        started = time.monotonic()
        while not list((tmp_path / "out").glob("trials/a/.seed-0.partial/train/resume/metrics*")):
            assert driver.poll() is None, log.read_text()
            assert time.monotonic() - started < 300, log.read_text()
            time.sleep(0.1)
        children = psutil.Process(driver.pid).children(recursive=True)
        driver.send_signal(signal.SIGINT)

        assert driver.wait(60) == 130, log.read_text()
    finally:
        driver.kill()
        driver.wait()
    assert "Traceback" not in log.read_text()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
