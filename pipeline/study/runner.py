"""Runs the trials of a study: side by side on processes of their own, or one after the other.

Only the thread that asks for outcomes starts and ends processes, so none is started once a study is
interrupted.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any, Self

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from rich.console import Console

from embedding.errors import UserError
from embedding.memory import WORKER_ENVIRONMENT
from pipeline.cluster import Bundle, RaySession, free_now, listed
from pipeline.config import Recipe
from pipeline.console import Reporter
from pipeline.failures import last_line, user_error
from pipeline.stages import StageOutput, StageRecord, StageSpec, execute
from pipeline.study.trial import TrialJob, TrialProcess

POLL_S = 15.0
"""Between two lines while no process has come."""
STOP_S = 20.0
"""Trials whose processes were killed end within so long, or are left behind."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """One variant with one seed."""

    variant: str
    seed: int
    recipe: Recipe
    job: Callable[[Path], TrialJob]
    """Of a scratch directory."""
    spec: StageSpec
    """Its body runs the job on a worker group."""

    @property
    def name(self) -> str:
        """Path below `trials/`."""
        return f"{self.variant}/seed-{self.seed}"

    def on(self, process: Any) -> StageSpec:
        """The trial on a process that is kept for the next one."""

        def body(scratch: Path) -> StageOutput:
            output: StageOutput = ray.get(process.run.remote(self.job(scratch).model_dump_json()))
            return output

        return replace(self.spec, body=body)


@dataclass(frozen=True)
class Outcome:
    """Of a trial that has ended."""

    trial: Trial
    record: StageRecord | None
    error: Exception | None
    """Why there is no record."""


def on_groups(trials: Sequence[Trial], session: RaySession) -> Iterator[Outcome]:
    """Run trials one after the other, each on a worker group, when the cluster has room for it.

    Raises:
        UserError: it had none in time.
    """
    for trial in _seed_by_seed(trials):
        session.wait_for(trial.name, session.group())
        try:
            record = _execute(trial.spec)
        except Exception as error:  # noqa: BLE001 # the outcome is the error
            yield Outcome(trial, None, error)
        else:
            yield Outcome(trial, record, None)


@dataclass(frozen=True)
class _Slot:
    """A process, and the room that it and the actors of its trials have to themselves."""

    process: Any
    room: PlacementGroup

    def end(self) -> None:
        """The process, its actors with it; others may have the room."""
        ray.kill(self.process)
        remove_placement_group(self.room)


class TrialProcesses:
    """Runs trials of one rank on processes that come when the cluster has room for them.

    And for their actors: a process that took the last CPU would wait in vain for those, as would
    the others that did the same.

    A study begins with the first that comes, and gives back those that have nothing left to do. Use
    it as a context manager: at its end no process is left.
    """

    def __init__(self, recipes: Sequence[Recipe], slot: Sequence[Bundle]) -> None:
        """Nothing is started.

        Args:
            recipes: of all variants.
            slot: what a process and the actors of its trials ask for, the process first.
        """
        self._cluster = recipes[0].cluster
        self._has_content = any(recipe.content is not None for recipe in recipes)
        self._slot = list(slot)
        self._waiting: deque[Trial] = deque()
        self._coming: dict[Future[Any], _Slot] = {}
        """Those that Ray has no room for yet, or that import what trials need."""
        self._idle: list[_Slot] = []
        self._running: dict[Future[Any], tuple[Trial, _Slot]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Ends all processes at once, then their threads, while Ray is still there."""
        running = [slot for _, slot in self._running.values()]
        for slot in (*self._coming.values(), *self._idle, *running):
            slot.end()
        wait(self._running, timeout=STOP_S)

    def outcomes(
        self, trials: Sequence[Trial], at_once: int, say: Callable[[str], None] = logger.warning
    ) -> Iterator[Outcome]:
        """Run trials, seed by seed: what changes on the machine meanwhile meets all variants alike.

        Args:
            trials: to run.
            at_once: most of them side by side.
            say: shows a line while no process has come.

        Raises:
            UserError: no process came in time.
        """
        self._waiting.extend(_seed_by_seed(trials))
        for _ in range(min(at_once, len(trials))):
            self._start()
        while self._waiting or self._running:
            while self._waiting and self._idle:
                self._run(self._waiting.popleft(), self._idle.pop())
            if not self._waiting:
                self._give_back()
            for future in self._ended(say):
                if future in self._coming:
                    self._arrive(future)
                else:
                    yield self._finish(future)

    def _start(self) -> None:
        """A process that imports what trials need, so that no trial's time holds it."""
        room, rank = placement_group(self._slot), self._slot[0]
        process = (
            ray.remote(TrialProcess)
            .options(
                num_cpus=rank["CPU"],
                num_gpus=rank.get("GPU", 0.0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    room,
                    placement_group_bundle_index=0,
                    placement_group_capture_child_tasks=True,  # the actors of its trials
                ),
                runtime_env={"env_vars": WORKER_ENVIRONMENT},
            )
            .remote()
        )
        warm = process.warm_up.remote(self._cluster.use_gpu, self._has_content)
        self._coming[warm.future()] = _Slot(process, room)

    def _run(self, trial: Trial, slot: _Slot) -> None:
        future: Future[StageRecord] = Future()

        def run() -> None:
            try:
                future.set_result(_execute(trial.on(slot.process)))
            except BaseException as error:  # noqa: BLE001 # the future raises it
                future.set_exception(error)

        self._running[future] = trial, slot
        # The interpreter joins the threads of a pool at its end, however long they take.
        Thread(target=run, daemon=True).start()

    def _ended(self, say: Callable[[str], None]) -> set[Future[Any]]:
        """The next trials that have ended and processes that have come.

        As long as a trial runs, processes may take their time.
        """
        if self._running:
            return wait((*self._running, *self._coming), return_when=FIRST_COMPLETED).done
        started = time.monotonic()
        timeout_s = max(self._cluster.wait_timeout_s, self._cluster.autoscale_timeout_s or 0.0)
        while not (ended := wait(self._coming, POLL_S, return_when=FIRST_COMPLETED).done):
            waited_s = time.monotonic() - started
            room = f"a trial needs {listed(self._slot)}, and free are {free_now()}"
            if waited_s >= timeout_s:
                raise UserError(
                    f"no process of the study came up in {timeout_s:.0f} s "
                    f"(cluster.wait_timeout_s, or autoscale_timeout_s): {room}, perhaps not "
                    "on the nodes where they are needed; see `ray status` for who holds the rest, "
                    "and run the same command again later, or wait longer"
                )
            say(f"  no trial runs: {room} (waited {waited_s:.0f} of {timeout_s:.0f} s)")
        return ended

    def _arrive(self, future: Future[Any]) -> None:
        """Of several processes some may fail to start; without any the study ends."""
        slot = self._coming.pop(future)
        error = future.exception()
        if error is None:
            self._idle.append(slot)
            return
        slot.end()
        if not (self._coming or self._idle or self._running):
            raise error
        logger.warning("a process of the study did not start: %s", last_line(error))

    def _finish(self, future: Future[StageRecord]) -> Outcome:
        trial, slot = self._running.pop(future)
        error = future.exception()
        if error is None or user_error(error) is not None:
            self._idle.append(slot)
        else:
            # The next trial must meet neither a dead process nor one whose device has failed.
            slot.end()
            if self._waiting:
                self._start()
        if error is None:
            return Outcome(trial, future.result(), None)
        if not isinstance(error, Exception):
            raise error
        return Outcome(trial, None, error)

    def _give_back(self) -> None:
        """No trial is left that could need a process that does not run one."""
        for slot in (*self._idle, *self._coming.values()):
            slot.end()
        self._idle.clear()
        self._coming.clear()


def _seed_by_seed(trials: Sequence[Trial]) -> list[Trial]:
    return sorted(trials, key=lambda trial: trial.seed)


def _execute(spec: StageSpec) -> StageRecord:
    return execute(spec, Reporter(Console(quiet=True)))
