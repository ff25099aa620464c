"""Any valid table set gets a valid plan or a reasoned refusal; refusals name what would help."""

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embedding.config import (
    Adagrad,
    Adam,
    ColumnWise,
    DataParallel,
    Grid,
    ManagedCollision,
    RowWise,
    RowWiseAdagrad,
    Sgd,
    TableColumnWise,
    TableConfig,
    TableRowWise,
    TableWise,
)
from embedding.errors import UserError
from embedding.feature_schema import (
    FeatureSchema,
    HistoryConfig,
    SequenceFeature,
    SparseFeature,
)
from embedding.planning.choices import FUSED, UVM, UVM_CACHING
from embedding.planning.cluster_shape import ClusterShape, find_machine, parse_shape
from embedding.planning.demand import StepSettings
from embedding.planning.plan_description import PlanDescription
from embedding.planning.planner import PlanRequest, check_trainable, plan_tables

GIB = 1 << 30
FORCED = (
    *(None, None, DataParallel(), TableWise(), RowWise(), ColumnWise(num_shards=2)),
    *(TableRowWise(), TableColumnWise(num_shards=2), Grid(num_column_shards=2)),
)


@st.composite
def schemas(draw: st.DrawFn) -> FeatureSchema:
    tables, sparse, sequences = [], [], []
    for index in range(draw(st.integers(1, 7))):
        managed = draw(st.integers(0, 5)) == 0
        tables.append(
            TableConfig(
                name=f"t{index}",
                num_embeddings=draw(st.integers(2, 3 * 10**9)),
                embedding_dim=4 * draw(st.integers(1, 256)),
                ids=ManagedCollision() if managed else TableConfig.model_fields["ids"].default,
                sharding=None if managed else draw(st.sampled_from(FORCED)),
            )
        )
        if draw(st.integers(0, 3)) == 0:
            sequences.append(SequenceFeature(name=f"s{index}", history="h", table=f"t{index}"))
        if not sequences or sequences[-1].table != f"t{index}" or draw(st.booleans()):
            length = draw(st.integers(1, 200))
            sparse.append(SparseFeature(name=f"f{index}", table=f"t{index}", max_length=length))
    return FeatureSchema(
        tables=tuple(tables),
        sparse=tuple(sparse),
        histories=(HistoryConfig(name="h", max_length=draw(st.integers(1, 100))),),
        sequences=tuple(sequences),
    )


@st.composite
def requests(draw: st.DrawFn) -> PlanRequest:
    machine = find_machine(draw(st.sampled_from(["cpu", "h100", "v100"])))
    memory = int(GIB * draw(st.sampled_from([0.01, 1, 80])))
    machine = machine.model_copy(
        update={"hbm_bytes": memory if machine.hbm_bytes else 0, "host_bytes": 16 * memory}
    )
    optimizers = [RowWiseAdagrad(), Adagrad(), Sgd()] + ([Adam()] if machine.hbm_bytes else [])
    return PlanRequest(
        schema=draw(schemas()),
        shape=ClusterShape(
            machine=machine,
            num_hosts=draw(st.integers(1, 3)),
            ranks_per_host=draw(st.sampled_from([1, 2, 3, 8])),
        ),
        settings=StepSettings(draw(st.integers(1, 70_000)), draw(st.sampled_from(optimizers))),
        kernels=draw(st.sampled_from([(FUSED,), (FUSED, UVM, UVM_CACHING)])),
    )


@given(request=requests())
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_tables_get_a_valid_plan_or_a_reasoned_refusal(request: PlanRequest) -> None:
    plan, reason = None, ""
    try:
        plan = plan_tables(request)
    except UserError as error:
        reason = str(error)
    if plan is None:
        what, _, remedy = reason.partition(";")
        assert len(what) > 20
        assert len(remedy) > 10
    else:
        check_plan(plan, request)


def check_plan(plan: PlanDescription, request: PlanRequest) -> None:
    check_trainable(plan, request.schema)
    assert plan == PlanDescription.model_validate_json(plan.model_dump_json())
    for table in request.schema.tables:
        entry = plan.table(table.name)
        assert entry is not None
        copies = request.shape.world_size if entry.sharding == "data_parallel" else 1
        area = sum(shard.num_rows * shard.num_columns for shard in entry.shards)
        assert area == copies * table.num_embeddings * table.embedding_dim
        corners = {(s.rank, s.row_offset, s.column_offset) for s in entry.shards if s.num_rows}
        assert len(corners) == len([s for s in entry.shards if s.num_rows])
        assert all(0 <= shard.rank < request.shape.world_size for shard in entry.shards)
        assert all(shard.num_columns % 4 == 0 for shard in entry.shards)
        if table.sharding is not None:
            forced = "grid_shard" if table.sharding.kind == "grid" else table.sharding.kind
            assert entry.sharding == forced
    predicted = plan.predicted
    assert predicted is not None
    # Each kind of bytes is rounded down by itself.
    assert predicted.peak_bytes <= request.model().device_capacity + 8
    assert predicted.step_s > 0


def request_for(rows: int, dim: int, topology: str, **changes: object) -> PlanRequest:
    table = TableConfig(name="big", num_embeddings=rows, embedding_dim=dim)
    small = TableConfig(name="small", num_embeddings=100, embedding_dim=16)
    schema = FeatureSchema(
        tables=(table, small),
        sparse=(SparseFeature(name="b", table="big"), SparseFeature(name="s", table="small")),
    )
    settings = StepSettings(1024, RowWiseAdagrad())
    request = PlanRequest(schema=schema, shape=parse_shape(topology), settings=settings)
    return replace(request, **changes)


@pytest.mark.parametrize(
    ("planned", "messages"),
    [
        (
            request_for(10**9, 128, "h100:1", kernels=(FUSED,)),
            ["'big'", "GiB short", "fused_uvm_caching", "h100:8"],
        ),
        (
            request_for(2 * 10**8, 128, "h100:2", settings=StepSettings(1024, Adam()),
                        kernels=(FUSED,)),
            ["row_wise_adagrad instead of adam", "h100:8"],
        ),
        (
            request_for(1000, 512, "h100:8", settings=StepSettings(2**25, RowWiseAdagrad())),
            ["batch_size_per_rank="],
        ),
        (request_for(10**13, 64, "h100:8"), ["GiB short", "no single change"]),
    ],
    ids=["offload", "optimizer", "batch", "hopeless"],
)  # fmt: skip
def test_a_refusal_says_how_much_is_short_and_what_would_fit(
    planned: PlanRequest, messages: list[str]
) -> None:
    with pytest.raises(UserError) as raised:
        plan_tables(planned)
    for message in messages:
        assert message in str(raised.value)


def test_the_cluster_a_refusal_names_is_large_enough() -> None:
    planned = request_for(4 * 10**9, 128, "h100:8", kernels=(FUSED,))
    with pytest.raises(UserError) as raised:
        plan_tables(planned)
    named = str(raised.value).split("use h100:")[1].split(";")[0].split(" ")[0]
    hosts = int(named.split("x")[0])
    check_plan(
        plan_tables(replace(planned, shape=parse_shape(f"h100:{named}"))),
        replace(planned, shape=parse_shape(f"h100:{named}")),
    )
    with pytest.raises(UserError):
        plan_tables(replace(planned, shape=parse_shape(f"h100:{hosts - 1}x8")))


def test_pinned_tables_stay_and_the_rest_is_placed() -> None:
    planned = request_for(10**6, 64, "h100:2x4")
    first = plan_tables(planned)
    big = first.table("big")
    assert big is not None
    only_big = first.model_copy(update={"tables": (big,)})
    again = plan_tables(replace(planned, pinned=only_big))
    assert again.table("big") == big
    check_plan(again, planned)
    with pytest.raises(UserError, match="misses the tables"):
        check_trainable(only_big, planned.schema)


def test_a_plan_for_other_tables_or_ranks_is_refused() -> None:
    plan = plan_tables(request_for(10**6, 64, "h100:2x4"))
    with pytest.raises(UserError, match="is for 8 ranks and h100:4 has 4"):
        plan_tables(request_for(10**6, 64, "h100:4", pinned=plan))
    with pytest.raises(UserError, match="does not tile"):
        plan_tables(request_for(10**6 + 999, 64, "h100:2x4", pinned=plan))
    with pytest.raises(UserError, match="'big' is for 1000000 x 64 elements.* 1000000 x 128"):
        check_trainable(plan, request_for(10**6, 128, "h100:2x4").schema)
    request = request_for(10**6, 64, "h100:2x4", pinned=plan)
    tables = tuple(t for t in request.schema.tables if t.name == "big")
    features = tuple(f for f in request.schema.sparse if f.table == "big")
    schema = request.schema.model_copy(update={"tables": tables, "sparse": features})
    with pytest.raises(UserError, match="which the recipe lacks"):
        plan_tables(replace(request, schema=schema))


def test_a_pinned_plan_that_does_not_fit_says_so() -> None:
    plan = plan_tables(request_for(10**8, 64, "h100:2x4"))
    machine = find_machine("h100").model_copy(update={"hbm_bytes": GIB})
    shape = ClusterShape(machine=machine, num_hosts=2, ranks_per_host=4)
    request = request_for(10**8, 64, "h100:2x4", pinned=plan)
    with pytest.raises(UserError, match="the pinned plan does not fit"):
        plan_tables(replace(request, shape=shape))


def test_copies_for_checkpoints_take_the_hosts_memory() -> None:
    """60 GiB of weights on two GPUs whose host has 64 GiB: the tables fit, their copy does not."""
    machine = find_machine("h100").model_copy(update={"host_bytes": 64 * GIB})
    shape = ClusterShape(machine=machine, ranks_per_host=2)
    planned = replace(request_for(60 * 2**20, 256, "h100:2"), shape=shape)
    plan_tables(planned)
    settings = replace(planned.settings, copies_for_checkpoints=True)
    with pytest.raises(UserError, match=r"checkpoints are written .* needs 60\.\d\d GiB of 54\.40"):
        plan_tables(replace(planned, settings=settings))
    more = find_machine("h100").model_copy(update={"host_bytes": 80 * GIB})
    roomy = replace(planned, settings=settings, shape=shape.model_copy(update={"machine": more}))
    plan = plan_tables(roomy)
    assert plan.predicted is not None
    copied = sum(rank.host_bytes["copy"] for rank in plan.predicted.ranks)
    assert copied >= sum(plan.weight_bytes_per_rank()) > 60 * GIB
    assert all(rank.bytes["copy"] == 0 for rank in plan.predicted.ranks)
