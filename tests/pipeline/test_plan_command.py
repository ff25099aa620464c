"""`braid plan` through the command line: plans of a laptop's and of a GPU cluster's ranks."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import ray
import torch

from deploy.app import main
from embedding.planning.calibration import _MEASURED, installed_versions
from embedding.planning.cluster_shape import parse_shape
from embedding.planning.plan_description import PlanDescription, read_plan
from pipeline.capacity.sweep import SweepOptions, sweep_request
from pipeline.cluster import RaySession
from pipeline.plan import PLAN, present_shape, training_shape
from pipeline.plan import plan as plan_stage
from pipeline.planning.cli import _no_ranks
from pipeline.planning.request import plan_request
from pipeline.recipe import load_recipe
from tests.embedding.test_calibration import calibration
from tests.pipeline.test_traffic import traffic_of

Plan = Callable[..., PlanDescription]

ROOT = Path(__file__).parents[2]
GIB = 1 << 30


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Runs `braid plan` of the demo recipe and reads the file it writes."""

    def run(topology: str, *options: str, name: str = "plan.json") -> PlanDescription:
        path = tmp_path / name
        given = ["plan", "--recipe", "demo", "--topology", topology, "--json", str(path), *options]
        assert main(given) == 0
        return read_plan(path)

    return run


def refused(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The one sentence `braid plan` of the demo recipe refuses with."""
    code = main(["plan", "--recipe", "demo", *options])
    said = capsys.readouterr().err
    assert code == 2, said
    (sentence,) = [line for line in said.splitlines() if line.startswith("error: ")]
    return sentence


@pytest.mark.parametrize(("topology", "world_size"), [("h200:1x8", 8), ("cpu:2", 2)])
def test_every_table_of_the_recipe_is_placed_and_shown(
    plan: Plan, capsys: pytest.CaptureFixture[str], topology: str, world_size: int
) -> None:
    made = plan(topology)
    shown = capsys.readouterr().out
    tables = {table.name: table for table in load_recipe("demo").features.tables}
    assert {table.table for table in made.tables} == set(tables)
    assert made.world_size == world_size
    for entry in made.tables:
        config = tables[entry.table]
        copies = world_size if entry.sharding == "data_parallel" else 1
        weights = 4 * config.num_embeddings * config.embedding_dim * copies
        assert sum(shard.weight_bytes for shard in entry.shards) == weights
        assert entry.table in shown
        assert entry.sharding in shown
    assert made.predicted is not None
    assert len(made.predicted.ranks) == world_size
    assert made.predicted.binding in " ".join(shown.split())


def test_the_file_is_the_same_every_time_and_needs_no_torch(plan: Plan, tmp_path: Path) -> None:
    plan("h200:1x8", name="here.json")
    code = (
        "import sys; from deploy.app import main; code = main(sys.argv[1:])\n"
        "assert 'torch' not in sys.modules and 'ray' not in sys.modules\n"
        "sys.exit(code)"
    )
    there = tmp_path / "there.json"
    given = ("plan", "--recipe", "demo", "--topology", "h200:1x8", "--json", str(there))
    subprocess.run([sys.executable, "-c", code, *given], cwd=ROOT, check=True, capture_output=True)
    assert there.read_bytes() == (tmp_path / "here.json").read_bytes()


def test_tables_that_the_traffic_does_not_name_are_named(
    plan: Plan, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tables = load_recipe("demo").features.tables
    rows = {table.name: table.num_embeddings for table in tables}
    path = tmp_path / "traffic.json"

    def said_with(measured: dict[str, int]) -> str:
        path.write_text(traffic_of(**measured).model_dump_json())
        made = plan("cpu:2", "--traffic", str(path))
        assert made.unmeasured == tuple(name for name in rows if name not in measured)
        return " ".join(capsys.readouterr().out.split())

    plan("cpu:2")
    assert "Lookups: by Zipf's law" in " ".join(capsys.readouterr().out.split())
    assert "Lookups: as measured." in said_with(rows)
    said = said_with(
        {name: number for name, number in rows.items() if name not in ("item", "user")}
    )
    named = [name for name in rows if name in ("item", "user")]
    assert f"by Zipf's law of {', '.join(named)}: the traffic has none" in said


def test_traffic_of_another_recipe_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "traffic.json"
    path.write_text(traffic_of(colour=10).model_dump_json())
    refusal = "and none of the recipe's is among them"
    assert refusal in refused(capsys, "--topology", "cpu:2", "--traffic", str(path))
    code, said = checked(capsys, f"embedding.sharding.traffic={path}")
    assert (code, refusal in said) == (2, True)


def test_constraints_are_kept(plan: Plan) -> None:
    made = plan("h200:1x8", "--constraint", "item=row_wise", "--constraint", "user=column_wise:4")
    item, user = made.table("item"), made.table("user")
    assert item is not None
    assert user is not None
    assert item.sharding == "row_wise"
    assert user.sharding == "column_wise"
    assert sorted(shard.column_offset for shard in user.shards) == [0, 4, 8, 12]


def test_a_pinned_plan_stays_and_the_difference_is_named(
    plan: Plan, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    forced = plan("cpu:2", "--constraint", "item=row_wise", name="forced.json")
    capsys.readouterr()
    path = str(tmp_path / "forced.json")

    pinned = plan("cpu:2", "--pin", path, "--diff", path)
    assert "No table is placed differently" in " ".join(capsys.readouterr().out.split())
    assert pinned.tables == forced.tables

    free = plan("cpu:2", "--constraint", "item=table_wise", "--diff", path)
    shown = capsys.readouterr().out
    changed = [t.table for t in free.tables if t != forced.table(t.table)]
    assert "item" in changed
    assert f"{len(changed)} table" in " ".join(shown.split())
    assert "row_wise fused on 0-1" in shown


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (("--topology", "h20:8"), ["did you mean 'h200'"]),
        (("--topology", "h200:0"), ["has no rank", "at least one"]),
        (("--topology", "h200:9"), ["a h200 host has 8 ranks", "h200:2x8"]),
        (("--topology", "cpu:2", "--constraint", "itm=row_wise"), ["did you mean 'item'"]),
        (("--topology", "cpu:2", "--constraint", "item=row_wize"), ["did you mean 'row_wise'"]),
        (("--topology", "cpu:2", "--constraint", "item"), ["write it as table=row_wise"]),
        (("--topology", "cpu:2", "--kernel", "fuzed"), ["did you mean 'fused'"]),
        (("--topology", "cpu:2", "--pin", "none.json"), ["none.json does not exist"]),
        (("--topology", "cpu:2", "--traffic", "none.json"), ["braid traffic"]),
        (("--topology", "cpu:2", "--json", "no/x.json"), ["no directory no", "create it"]),
        (
            ("--topology", "h200:8", "--set", "features.tables.item.num_embeddings=3000000000000"),
            ["no sharding plan fits h200:8", "'item'", "GiB short", "use h200:"],
        ),
        (
            ("--topology", "v100:1", "--kernel", "fused", "--set",
             "features.tables.item.num_embeddings=1000000000"),
            ["'item'", "GiB short", "fused_uvm_caching"],
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_one_sentence_with_the_remedy(
    capsys: pytest.CaptureFixture[str], options: tuple[str, ...], messages: list[str]
) -> None:
    sentence = refused(capsys, *options)
    for message in messages:
        assert message in sentence


def test_a_plan_of_other_tables_or_ranks_is_refused(
    plan: Plan, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plan("cpu:2")
    pin = ("--pin", str(tmp_path / "plan.json"))
    assert "is for 2 ranks" in refused(capsys, "--topology", "cpu:4", *pin)
    larger = ("--set", "features.tables.item.num_embeddings=9001")
    assert "does not tile" in refused(capsys, "--topology", "cpu:2", *pin, *larger)


def checked(capsys: pytest.CaptureFixture[str], *overrides: str) -> tuple[int, str]:
    """Exit code and words of `braid validate` of the demo recipe with these overrides."""
    capsys.readouterr()
    options = [text for override in overrides for text in ("--set", override)]
    code = main(["validate", "--recipe", "demo", *options])
    said = capsys.readouterr()
    return code, said.out + said.err


def test_a_recipe_is_valid_with_a_plan_that_it_can_train_with_only(
    plan: Plan, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    named = f"embedding.sharding.plan={tmp_path / 'plan.json'}"
    code, said = checked(capsys, named)
    assert (code, "plan.json does not exist" in said) == (2, True)
    plan("cpu:2")
    assert checked(capsys, named)[0] == 0
    code, said = checked(capsys, named, "cluster.num_workers=4")
    assert (code, "is for 2 ranks and cluster.num_workers is 4" in said) == (2, True)
    assert "without --topology plans for those, or set cluster.num_workers=2" in said
    fewer = PlanDescription.model_validate(
        (made := read_plan(tmp_path / "plan.json")).model_dump() | {"tables": made.tables[1:]}
    )
    (tmp_path / "plan.json").write_text(fewer.model_dump_json())
    code, said = checked(capsys, named)
    assert (code, f"misses the tables ['{made.tables[0].table}']" in said) == (2, True)


@pytest.mark.integration
@pytest.mark.usefixtures("shared_ray")
def test_here_is_what_the_plan_stage_plans_for_and_cluster_is_all_there_is(
    plan: Plan, tmp_path: Path
) -> None:
    """One rank with a memory limit, on a machine that has room for more ranks."""
    own = ("cluster.num_workers=1", "embedding.sharding.hbm_gib=0.25")
    recipe = load_recipe("demo", own)
    options = [text for override in own for text in ("--set", override)]
    plan_stage(recipe, tmp_path)
    assert training_shape(recipe).device_bytes == GIB // 4
    whole = present_shape(recipe.cluster)
    here = plan("here", *options, name="here.json")
    everywhere = plan("cluster", *options, name="all.json")

    assert here == read_plan(tmp_path / PLAN)
    assert (here.topology, here.world_size) == ("cpu:1", 1)
    assert whole.world_size == ray.cluster_resources()["CPU"]
    assert everywhere.world_size == whole.world_size


def test_a_recipes_own_plan_is_named_where_it_is_left_out(
    plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only `braid run` kept it, and `braid plan` said nothing."""
    own, kept = tmp_path / "own.json", "embedding.sharding.plan"
    first = plan("cpu:2", "--constraint", "item=row_wise", name="own.json")
    capsys.readouterr()

    anew = plan("cpu:2", "--set", f"{kept}={own}")
    said = "".join(capsys.readouterr().out.split())
    assert f"{kept}={own},which`braidrun`trainswith,isleftout;--pin{own}keeps" in said
    assert anew.table("item") != first.table("item")

    pinned = plan("cpu:2", "--set", f"{kept}={own}", "--pin", str(own))
    assert "left out" not in capsys.readouterr().out
    assert pinned.tables == first.tables


@pytest.mark.parametrize("topology", ["here", "cluster"])
def test_gpus_that_this_machine_lacks_are_said_before_a_ray_is_started(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, topology: str
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(RaySession, "start", Mock(side_effect=AssertionError))
    command = ["plan", "--recipe", "demo", "--topology", topology]
    command += ["--set", "cluster={num_workers: 16, cpus_per_worker: 12, use_gpu: true}"]

    assert main(command) == 2

    said = " ".join(capsys.readouterr().err.split())
    assert f"--topology {topology} is this machine" in said
    assert "it has 2 GPUs, and the recipe trains on 16" in said
    assert "--topology h200:2x8" in said


def test_commands_that_train_nothing_ask_for_no_cpus_of_ranks() -> None:
    """Of a recipe for a cluster they started a Ray of 12 CPUs on a laptop."""
    asked = _no_ranks(load_recipe("cluster"))
    assert (asked.num_workers, asked.cpus_per_worker, asked.use_gpu) == (1, 1, False)


def test_the_guide_names_the_keys_that_a_calibration_measures() -> None:
    text = (ROOT / "docs" / "capacity.md").read_text()
    (named,) = re.findall(r"nothing that was measured \(([^)]*)\)", text)
    assert {key.strip("`") for key in named.split(", ")} == {*_MEASURED} - {"device"}


def test_a_plan_with_a_kernel_that_training_lacks_is_refused(
    plan: Plan, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    made = plan("h200:2", "--constraint", "item=table_wise")
    other = made.table("item").model_copy(update={"kernel": "key_value"})
    tables = tuple(other if table.table == "item" else table for table in made.tables)
    path = tmp_path / "plan.json"
    path.write_text(made.model_copy(update={"tables": tables}).model_dump_json())
    code, said = checked(capsys, f"embedding.sharding.plan={path}")
    assert (code, "{'item': 'key_value'}" in said) == (2, True)
    assert "fused, fused_uvm, fused_uvm_caching" in said
    assert "'key_value' is unknown" in refused(capsys, "-t", "h200:2", "--kernel", "key_value")


@pytest.mark.parametrize("topology", ["h200:2x4", "cpu:2"])
def test_a_limit_of_memory_holds_on_every_topology(topology: str) -> None:
    recipe = load_recipe("demo", ["embedding.sharding.hbm_gib=0.25"])
    shape = parse_shape(topology)
    planned = plan_request(recipe, shape).shape
    assert (planned.name, planned.device_bytes) == (topology, GIB // 4)
    assert plan_request(recipe, planned).shape == planned
    (swept,) = sweep_request(recipe, SweepOptions((topology,))).shapes
    assert swept == planned
    more = load_recipe("demo", ["embedding.sharding.hbm_gib=1e6"])
    assert plan_request(more, shape).shape.device_bytes == shape.device_bytes


def test_a_kernel_that_cpus_lack_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "the only kernel is fused" in refused(capsys, "-t", "cpu:2", "--kernel", "fused_uvm")


def test_a_calibration_of_another_version_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "calibration.json"
    versions = installed_versions() | {"torchrec": "0.1"}
    made = calibration("h200", device_name="NVIDIA H200", versions=versions)
    path.write_text(made.model_dump_json())
    sentence = refused(capsys, "--topology", "h200:8", "--calibration", str(path))
    assert "made with torchrec 0.1" in sentence
    assert "braid bench plan --calibrate" in sentence
