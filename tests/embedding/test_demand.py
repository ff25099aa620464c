"""Counted work against a naive loop over every id of every rank."""

from dataclasses import replace

import numpy as np
import pytest
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    construct_split_state,
)

from embedding.config import Adagrad, Adam, RowWiseAdagrad, TableConfig
from embedding.feature_schema import FeatureSchema, SparseFeature
from embedding.planning.choices import Choice, shards_of
from embedding.planning.cluster_shape import ClusterShape, find_machine
from embedding.planning.cost import CostModel, Placed, usage_of
from embedding.planning.cost_constants import PCIE_GATHER_SHARE, data_sheet_constants
from embedding.planning.counts import COUNT_INDEX
from embedding.planning.demand import COPY, StepSettings
from embedding.planning.id_distribution import IdDistribution
from embedding.planning.plan_description import BYTE_KINDS, PHASES
from embedding.planning.workload import table_loads

WORLD, BATCH, ROWS, DIM, POOLING = 4, 50, 1000, 32, 3
SHAPE = ClusterShape(machine=find_machine("cpu"), num_hosts=2, ranks_per_host=2)
TABLE = TableConfig(name="t", num_embeddings=ROWS, embedding_dim=DIM)
SCHEMA = FeatureSchema(
    tables=(TABLE,), sparse=(SparseFeature(name="f", table="t", max_length=POOLING),)
)
CHOICES = (
    Placed(Choice("table_wise", "fused"), (1,)),
    Placed(Choice("row_wise", "fused"), (0,)),
    Placed(Choice("column_wise", "fused", 2), (0, 3)),
    Placed(Choice("table_row_wise", "fused"), (1,)),
    Placed(Choice("grid_shard", "fused", 2), (0, 1)),
    Placed(Choice("data_parallel", "dense"), (0,)),
)


def usage(placed: Placed, optimizer=RowWiseAdagrad()):  # noqa: B008
    loads = table_loads(SCHEMA, exponent=0.0)
    model = CostModel(loads, SHAPE, StepSettings(BATCH, optimizer), data_sheet_constants(SHAPE))
    return usage_of(model, {"t": placed})


@pytest.mark.parametrize("placed", CHOICES, ids=lambda p: str(p.choice))
def test_ids_and_bytes_on_every_rank_agree_with_a_loop(placed: Placed) -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, ROWS, (WORLD, BATCH * POOLING))
    received, looked_up = np.zeros(WORLD), np.zeros(WORLD)
    load = table_loads(SCHEMA)[0]
    for rank, row, _, num_rows, num_columns in shards_of(load, *placed, SHAPE):
        own = placed.choice.sharding == "data_parallel"
        for source in [rank] if own else range(WORLD):
            hits = int(((ids[source] >= row) & (ids[source] < row + num_rows)).sum())
            received[rank] += 0 if own else hits
            looked_up[rank] += hits * num_columns * 4
    counted = usage(placed)
    counts = counted.counts_WK
    # 600 ids over the ranks: what a rank gets varies by a few percent around its share.
    np.testing.assert_allclose(counts[:, COUNT_INDEX["input_received_ids"]], received, rtol=0.15)
    name = "replicated_lookup_bytes" if placed.choice.kernel == "dense" else "lookup_bytes"
    np.testing.assert_allclose(counts[:, COUNT_INDEX[name]], looked_up, rtol=0.15)


@pytest.mark.parametrize("placed", CHOICES[:3], ids=lambda p: str(p.choice))
def test_exchanged_bytes_agree_with_a_loop(placed: Placed) -> None:
    """Bytes that leave a rank and bytes that reach it, half of each: what a link is busy with."""
    sent, arrived = np.zeros(WORLD), np.zeros(WORLD)
    load = table_loads(SCHEMA)[0]
    for rank, *_, num_columns in shards_of(load, *placed, SHAPE):
        for other in range(WORLD):
            if other != rank:
                sent[rank] += BATCH * num_columns * 4
                arrived[other] += BATCH * num_columns * 4
    counts = usage(placed).counts_WK
    counted = counts[:, COUNT_INDEX["exchange_bytes"]] + counts[:, COUNT_INDEX["reduce_bytes"]]
    np.testing.assert_allclose(counted, (sent + arrived) / 2)


@pytest.mark.parametrize(("device", "gradient_bytes"), [("cpu", 4), ("h100", 2)])
@pytest.mark.parametrize("placed", CHOICES[:-1], ids=lambda p: str(p.choice))
def test_gradients_are_narrow_on_the_wire_on_cuda_only(placed, device, gradient_bytes) -> None:
    shape = ClusterShape(machine=find_machine(device), num_hosts=2, ranks_per_host=2)
    settings = StepSettings(BATCH, RowWiseAdagrad(), wire_bytes=2)
    model = CostModel(table_loads(SCHEMA), shape, settings, data_sheet_constants(shape))
    counts = usage_of(model, {"t": placed}).counts_WK
    for backward, output in (
        ("backward_exchange_bytes", "exchange_bytes"),
        ("backward_gather_bytes", "reduce_bytes"),
        ("backward_inter_bytes", "output_inter_bytes"),
    ):
        vectors, gradients = (counts[:, COUNT_INDEX[name]] for name in (output, backward))
        np.testing.assert_allclose(gradients, vectors / 2 * gradient_bytes)
        assert (vectors > 0).any() or output in ("exchange_bytes", "reduce_bytes")


@pytest.mark.parametrize("placed", CHOICES, ids=lambda p: str(p.choice))
@pytest.mark.parametrize("optimizer", [RowWiseAdagrad(), Adagrad()])
def test_weights_and_states_are_the_shards_bytes(placed: Placed, optimizer) -> None:
    load = table_loads(SCHEMA)[0]
    weights, states = np.zeros(WORLD), np.zeros(WORLD)
    for rank, _, _, num_rows, num_columns in shards_of(load, *placed, SHAPE):
        weights[rank] += num_rows * num_columns * 4
        states[rank] += num_rows * 4 * (num_columns if optimizer.kind == "adagrad" else 1)
    held = usage(placed, optimizer).bytes_WM
    np.testing.assert_array_equal(held[:, BYTE_KINDS.index("weights")], weights)
    np.testing.assert_array_equal(held[:, BYTE_KINDS.index("optimizer")], states)


@pytest.mark.parametrize("placed", CHOICES, ids=lambda p: str(p.choice))
def test_a_checkpoint_beside_training_holds_a_copy_of_weights_and_states(placed: Placed) -> None:
    load = table_loads(SCHEMA)[0]
    copied = np.zeros(WORLD)
    for rank, _, _, num_rows, num_columns in shards_of(load, *placed, SHAPE):
        if placed.choice.sharding != "data_parallel" or rank == 0:
            copied[rank] += num_rows * (num_columns + 1) * 4
    machines = {"cpu": SHAPE, "cuda": SHAPE.model_copy(update={"machine": find_machine("h100")})}
    for device, shape in machines.items():
        without, beside = (
            usage_of(
                CostModel(
                    table_loads(SCHEMA),
                    shape,
                    StepSettings(BATCH, RowWiseAdagrad(), copies_for_checkpoints=copies),
                    data_sheet_constants(shape),
                ),
                {"t": placed},
            )
            for copies in (False, True)
        )
        on_device = beside.bytes_WM[:, BYTE_KINDS.index("copy")]
        on_host = beside.host_bytes_WH[:, COPY]
        found, other = (on_device, on_host) if device == "cpu" else (on_host, on_device)
        # Of a replicated table the first host's share is the whole copy.
        np.testing.assert_array_equal(found.reshape(2, 2).sum(axis=1)[0], copied[:2].sum())
        if placed.choice.sharding != "data_parallel":
            np.testing.assert_array_equal(found, copied)
        np.testing.assert_array_equal(other, 0)
        assert not without.host_bytes_WH.any()
        assert not without.bytes_WM[:, BYTE_KINDS.index("copy")].any()


@pytest.mark.parametrize("kernel", ["fused_uvm", "fused_uvm_caching"])
@pytest.mark.parametrize("optimizer", [RowWiseAdagrad(), Adagrad(), Adam()], ids=lambda o: o.kind)
def test_updates_cross_to_host_memory_where_fbgemm_keeps_rows_and_states(kernel, optimizer) -> None:
    location = {
        "fused_uvm": EmbeddingLocation.MANAGED,
        "fused_uvm_caching": EmbeddingLocation.MANAGED_CACHING,
    }[kernel]
    split = construct_split_state(
        [(ROWS, DIM, location, ComputeDevice.CUDA)],
        rowwise=optimizer.kind == "row_wise_adagrad",
        cacheable=False,
    )
    states = {"row_wise_adagrad": 1, "adagrad": 1, "adam": 2}[optimizer.kind]
    factor = 0.1 if kernel == "fused_uvm_caching" else None
    shape = ClusterShape(machine=find_machine("h100"), ranks_per_host=1)
    loads = table_loads(SCHEMA, exponent=0.0)
    model = CostModel(loads, shape, StepSettings(BATCH, optimizer), data_sheet_constants(shape))
    counted = usage_of(model, {"t": Placed(Choice("table_wise", kernel, 1, factor), (0,))})

    weights = ROWS * DIM * 4
    assert counted.host_bytes_WH[0].sum() == weights + split.uvm_size * 4 * states
    touched = 1 - (1 - 1 / ROWS) ** (BATCH * POOLING)
    crossing = split.uvm_size * 4 * states + (weights if kernel == "fused_uvm" else 0)
    np.testing.assert_allclose(
        counted.counts_WK[0, COUNT_INDEX["update_host_bytes"]], 2 * touched * crossing
    )


def test_rows_in_host_memory_without_a_cache_cross_pcie_once_for_every_id() -> None:
    """64 samples of 5 ids, all of them row 0: 320 rows of 16 floats are read, one is updated."""
    machine = find_machine("h100")
    shape = ClusterShape(machine=machine, ranks_per_host=1)
    table = TableConfig(name="t", num_embeddings=100, embedding_dim=16)
    schema = FeatureSchema(
        tables=(table,), sparse=(SparseFeature(name="f", table="t", max_length=5),)
    )
    load = replace(table_loads(schema)[0], ids=IdDistribution((1.0,), (1.0,)))
    sheet = data_sheet_constants(shape)
    model = CostModel([load], shape, StepSettings(64, RowWiseAdagrad()), sheet)

    in_host = model.price("t", Choice("table_wise", "fused_uvm"))
    on_device = model.price("t", Choice("table_wise", "fused"))

    read, updated = 64 * 5 * 16 * 4, 2 * 16 * 4
    assert in_host.demand.owner[COUNT_INDEX["lookup_host_bytes"]] == read
    np.testing.assert_allclose(in_host.demand.owner[COUNT_INDEX["update_host_bytes"]], updated)
    more = dict(zip(PHASES, in_host.owner_s - on_device.owner_s, strict=True))
    over_pcie = PCIE_GATHER_SHARE * machine.pcie_bandwidth
    np.testing.assert_allclose(more["lookup"], read / over_pcie)
    np.testing.assert_allclose(more["backward"], updated / over_pcie)
