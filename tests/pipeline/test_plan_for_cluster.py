"""Plans follow the machines: made again for another cluster, refused where ranks are elsewhere."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from embedding.errors import UserError
from embedding.planning.cluster_shape import ClusterShape, find_machine
from embedding.planning.plan_description import PlanDescription
from embedding.planning.planner import plan_tables
from pipeline import run as run_module
from pipeline.artifacts import read_manifest
from pipeline.config import WindowConfig
from pipeline.console import Reporter
from pipeline.plan import PLAN, PlanFacts, PlannedCluster, plan_inputs
from pipeline.planning.request import parse_constraints, with_constraints
from pipeline.rank_hosts import Place, refuse_other_hosts
from pipeline.run import DayRun
from pipeline.stages import StageOutput, execute
from tests.embedding.test_planning import request_for
from tests.pipeline.small_log import DAYS, make_recipe, write_catalogue

GIB = 1 << 30


def hosts(num_hosts: int, ranks: int, host_gib: float = 8) -> ClusterShape:
    machine = find_machine("cpu").model_copy(update={"host_bytes": int(host_gib * GIB)})
    return ClusterShape(machine=machine, num_hosts=num_hosts, ranks_per_host=ranks)


class Machines:
    """Counts how often it is asked for the cluster, and what was planned."""

    def __init__(self, shape: ClusterShape) -> None:
        self.shape = shape
        self.asked = 0
        self.planned: list[str] = []

    def training_shape(self, _: object) -> ClusterShape:
        self.asked += 1
        return self.shape

    def plan(self, _: object, scratch: Path) -> StageOutput:
        self.planned.append(self.shape.name)
        (scratch / PLAN).write_text(self.shape.name)
        facts = PlanFacts(
            ranks_per_host=self.shape.ranks_per_host,
            predicted_step_s=1.0,
            constants="",
            binding="",
            cluster=PlannedCluster.of(self.shape),
        )
        return StageOutput(1, 1, facts)


def run_on(root: Path, machines: Machines, monkeypatch: pytest.MonkeyPatch) -> DayRun:
    for name in ("training_shape", "plan"):
        monkeypatch.setattr(run_module, name, getattr(machines, name))
    return DayRun(
        make_recipe(root).model_copy(update={"window": WindowConfig()}),
        root.parent / "out",
        DAYS[0],
        session=SimpleNamespace(wait_for=lambda *_: None),
        reporter=Reporter(),
        publish=lambda *_: None,
    )


def test_a_plan_is_made_again_for_another_cluster_when_ranks_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data"
    write_catalogue(root)
    for day in DAYS[:2]:
        (root / "events" / f"dt={day}").mkdir(parents=True)
    machines = Machines(hosts(2, 6))
    first = run_on(root, machines, monkeypatch)
    (spec,) = first.specs("plan")
    execute(spec, first.reporter)
    first.wait_for_ranks("train", [])
    assert (machines.asked, machines.planned) == (0, ["cpu:2x6"])

    machines.shape = hosts(2, 6, host_gib=8.1)
    again = run_on(root, machines, monkeypatch)
    (spec,) = again.specs("plan")
    assert spec.is_current
    assert machines.asked == 0
    again.wait_for_ranks("train", [])
    assert machines.planned == ["cpu:2x6"]

    for shape in (hosts(1, 12), hosts(1, 12, host_gib=4)):
        machines.shape = shape
        other = run_on(root, machines, monkeypatch)
        before = other.artifact_id("plan", DAYS[0])
        other.wait_for_ranks("train", [])
        other.wait_for_ranks("evaluate", [])
        assert (other.directory("plan") / PLAN).read_text() == "cpu:12"
        assert other.artifact_id("plan", DAYS[0]) == before
        manifest = read_manifest(other.directory("plan"), PlanFacts)
        assert manifest is not None
        assert manifest.facts.cluster == PlannedCluster.of(shape)
    assert machines.planned == ["cpu:2x6", "cpu:12", "cpu:12"]
    assert capsys.readouterr().out.count("made for another cluster than cpu:12") == 2


def test_a_plan_is_made_of_what_its_files_hold_whenever_they_were_copied(tmp_path: Path) -> None:
    """A job's working directory is unpacked anew, and all of its files get new times."""
    recipe, file = make_recipe(tmp_path), tmp_path / "calibration.json"
    file.write_text("1")
    sharding = recipe.embedding.sharding.model_copy(update={"calibration": file})
    embedding = recipe.embedding.model_copy(update={"sharding": sharding})
    calibrated = recipe.model_copy(update={"embedding": embedding})
    before = plan_inputs(calibrated)
    assert list(before) == ["calibration"]
    os.utime(file, ns=(1, 1))

    assert plan_inputs(calibrated) == before
    file.write_text("2")
    os.utime(file, ns=(1, 1))
    assert plan_inputs(calibrated) != before


def planned(sharding: str, topology: str = "cpu:2x6") -> PlanDescription:
    request = request_for(10**6, 64, topology)
    return plan_tables(
        with_constraints(request, parse_constraints([f"big={sharding}"], request.schema))
    )


def test_tables_cut_over_a_hosts_ranks_need_these_ranks_on_one_node() -> None:
    plan = planned("table_row_wise")
    even = [Place(node, 64 * GIB) for node in "aaaaaabbbbbb"]
    packed = [Place(node, 64 * GIB) for node in "aaaaaaaabbbb"]
    refuse_other_hosts(plan, even)
    refuse_other_hosts(plan, [Place("a", 64 * GIB)] * 12)
    with pytest.raises(UserError, match=r"2 hosts of 6 .* 8 \+ 4 ranks on 2 .*'big'.*_host=4"):
        refuse_other_hosts(plan, packed)
    refuse_other_hosts(planned("row_wise"), packed)


def test_ranks_that_share_a_node_need_its_memory_for_the_tables_of_all() -> None:
    plan = planned("row_wise", "cpu:2x2")
    assert plan.predicted is not None
    needed = [
        sum(rank.bytes.values()) + sum(rank.host_bytes.values()) for rank in plan.predicted.ranks
    ]
    two, four = sum(needed[:2]), sum(needed)
    refuse_other_hosts(plan, [Place(node, two) for node in "aabb"])
    refuse_other_hosts(plan, [Place("a", four)] * 4)
    with pytest.raises(UserError, match="node that Ray has put 4 ranks on"):
        refuse_other_hosts(plan, [Place("a", four - 1)] * 4)


def test_a_gpu_needs_the_memory_of_its_tables_and_its_node_does_not() -> None:
    plan = planned("row_wise", "h200:2")
    assert plan.predicted is not None
    most = plan.predicted.peak_bytes
    refuse_other_hosts(plan, [Place("a", 0, most)] * 2)
    with pytest.raises(UserError, match=r"rank 0's GPU"):
        refuse_other_hosts(plan, [Place("a", 0, most - 1)] * 2)
