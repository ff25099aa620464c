"""The content part of a step, computed by hand from made-up costs, and of real tiny towers."""

import os
from pathlib import Path

import pytest
import torch

from embedding.errors import UserError
from embedding.planning.cluster_shape import ClusterShape, find_machine, parse_shape
from embedding.planning.cost import RESERVED_SHARE
from embedding.planning.cost_constants import CORE_BANDWIDTH, CPU_CALL_S, GPU_CALL_S, GPU_EXCHANGE_S
from embedding.planning.planner import plan_tables
from multimodal.content_config import ContentConfig
from multimodal.content_cost import CicCost, EncoderCost
from pipeline.capacity.answer import answer_of
from pipeline.capacity.content_cost import content_cost
from pipeline.capacity.content_step import ContentStep, content_step
from pipeline.capacity.dense_cost import dense_cost
from pipeline.capacity.evaluate import _request_of, evaluate_point
from pipeline.capacity.item_load import ItemLoad
from pipeline.capacity.sweep import SweepOptions, sweep_request
from pipeline.capacity.types import (
    GPU_FLOPS_SHARE,
    CapacityPoint,
    CapacityRequest,
    ContentCost,
    DenseCost,
    PointKey,
    Target,
)
from pipeline.identity import plan_config
from pipeline.planning.request import RequestChanges, changed_request, plan_request
from pipeline.planning.reserve import with_reserve
from pipeline.planning_worker import plan_recipe
from pipeline.recipe import load_recipe

DIM, WIDTH, ITEMS = 16, 24, 1000
HEAD_FLOPS = 6 * ITEMS * WIDTH * DIM
"""Of the last layer: forward and two gradients, of every item."""
HEAD_BYTES = WIDTH * DIM * 4
ENCODER = EncoderCost(
    forward_flops=3e9,
    backward_flops=4e9,
    forward_operations=100,
    backward_operations=200,
    forward_s=0.01,
    backward_s=0.02,
    activation_bytes=1e6,
    token_bytes=5e4,
    weight_bytes=10**7,
    parameters=10**5,
    fused_width=WIDTH,
    head_s=2e-6,
)
CIC = CicCost(
    flops_per_item=1e4,
    flops_per_pair=100,
    bytes_per_item=50,
    bytes_per_pair=8,
    operations=60,
    cpu_s_per_flop=1e-9,
    parameters=500,
)
# So many candidates of 1000 equal items that each rank shows all of them, and events do the same.
EVERY_ITEM = ItemLoad(
    num_items=ITEMS,
    counted="a test",
    bin_items=(float(ITEMS),),
    bin_shares=(1.0,),
    events_per_row=0.0,
)
COST = ContentCost(encoder=ENCODER, cic=CIC, items=EVERY_ITEM)
BATCH = 1_000_000
DENSE = DenseCost(flops_per_row=2e6, parameters=10**6, cpu_seconds_per_row=1e-4, precision="bf16")


def config_of(**changes: object) -> ContentConfig:
    settings = {"text": {}, "dim": DIM, "gradient": {"max_items_per_step": None}, **changes}
    return ContentConfig.model_validate(settings)


def step_of(topology: str, config: ContentConfig, cost: ContentCost = COST) -> ContentStep:
    return content_step(cost, config, parse_shape(topology), BATCH)


def test_gpu_ranks_share_the_items_and_add_up_gradients() -> None:
    """1000 items on 16 ranks of 2 hosts: 63 each, in float32; rings over all network cards."""
    step = step_of("h100:2x8", config_of())
    assert step.items.encoded == pytest.approx(ITEMS)
    encoding = 63 * 7e9 / (GPU_FLOPS_SHARE * 67e12)
    assert encoding > 300 * GPU_CALL_S / 10
    reading = 63 * 5e4 * (2 / CORE_BANDWIDTH + 1 / 64e9)
    loss = (1e4 * ITEMS + 100 * ITEMS**2) / (GPU_FLOPS_SHARE * 67e12)
    loss = max(loss, 60 * GPU_CALL_S / 10)
    links = min(450e9, 8 * 50e9)
    vectors, values = ITEMS * WIDTH * 4, 10**5 * 4
    ids = 15 / 16 * 16 * ITEMS * 8 / links
    rings = 15 / 16 * vectors / links + 2 * 15 / 16 * (vectors + values + HEAD_BYTES) / links
    head = HEAD_FLOPS / (GPU_FLOPS_SHARE * 67e12)
    assert head < 3 * GPU_CALL_S / 10
    expected = encoding + reading + loss + ids + rings + 5 * GPU_EXCHANGE_S + 3 * GPU_CALL_S / 10
    assert step.rank_s == pytest.approx(expected)
    assert step.actor_s == 0
    assert step.added_seconds(0.5) == step.rank_s


def test_few_items_wait_for_their_kernels_to_be_started() -> None:
    one = COST.model_copy(
        update={"items": EVERY_ITEM.model_copy(update={"bin_items": (1.0,)}), "cic": None}
    )
    step = step_of("h100:1", config_of(), one)
    assert 7e9 / (GPU_FLOPS_SHARE * 67e12) < 300 * GPU_CALL_S / 10
    reading = 5e4 * (2 / CORE_BANDWIDTH + 1 / 64e9)
    assert step.rank_s == pytest.approx((300 + 3) * GPU_CALL_S / 10 + reading)


def test_an_encoder_in_bf16_computes_at_that_peak() -> None:
    single, half = (
        step_of("h100:1", config_of(cic=None, precision=p), COST.model_copy(update={"cic": None}))
        for p in ("fp32", "bf16")
    )
    faster = ITEMS * 7e9 / GPU_FLOPS_SHARE * (1 / 67e12 - 1 / 989e12)
    assert single.rank_s - half.rank_s == pytest.approx(faster)


def test_cpu_ranks_take_the_measured_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    step = step_of("cpu:4", config_of(cic=None), COST.model_copy(update={"cic": None}))
    reading = 250 * 5e4 * 2 / CORE_BANDWIDTH
    ids = 3 / 4 * 4 * ITEMS * 8 / 10e9
    vectors, values = ITEMS * WIDTH * 4, 10**5 * 4
    rings = (3 / 4 * vectors + 2 * 3 / 4 * (vectors + values + HEAD_BYTES)) / 10e9
    head = ITEMS * 2e-6
    assert step.rank_s == pytest.approx(250 * 0.03 + reading + head + ids + rings + 5 * CPU_CALL_S)
    with_loss = step_of("cpu:4", config_of())
    assert with_loss.rank_s - step.rank_s == pytest.approx(1e-9 * (1e7 + 1e8))


def test_more_cpu_ranks_than_cores_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that a core computes takes three times as long with six ranks on two cores."""
    seconds = {}
    for cores in (2, 64):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        seconds[cores] = step_of("cpu:6", config_of()).rank_s
    share = 167  # of 1000 items
    loss = 1e-9 * (1e4 * ITEMS + 100 * ITEMS**2)
    alone = share * (0.03 + 5e4 * 2 / CORE_BANDWIDTH) + loss + ITEMS * 2e-6
    assert seconds[2] - seconds[64] == pytest.approx(2 * alone)


def test_micro_batches_compute_forward_again_and_keep_one_piece() -> None:
    whole, pieces = (
        step_of("cpu:1", config_of(gradient={"max_items_per_step": None, "micro_batch_items": n}))
        for n in (None, 100)
    )
    assert pieces.rank_s - whole.rank_s == pytest.approx(ITEMS * 0.01)
    assert whole.rank_bytes - pieces.rank_bytes == pytest.approx((ITEMS - 100) * 1e6)


def test_micro_batches_come_to_a_gpu_one_at_a_time_and_once_more_for_backward() -> None:
    whole, pieces = (
        step_of("h100:1", config_of(gradient={"max_items_per_step": None, "micro_batch_items": n}))
        for n in (None, 100)
    )
    forward = ITEMS * (3e9 / (GPU_FLOPS_SHARE * 67e12) + 5e4 / 64e9)
    assert pieces.rank_s - whole.rank_s == pytest.approx(forward)
    assert whole.rank_bytes - pieces.rank_bytes == pytest.approx((ITEMS - 100) * (1e6 + 5e4))


def test_stale_micro_batches_start_as_many_kernels_as_they_are_pieces() -> None:
    """Forward, forward again for backward, backward, and the forward of the step before."""
    small = COST.model_copy(update={"items": EVERY_ITEM.model_copy(update={"bin_items": (4.0,)})})
    fresh, stale = (
        step_of(
            "h100:1",
            config_of(
                placement={"kind": "service", "gpus_per_actor": 1, "staleness": staleness},
                gradient={"max_items_per_step": None, "micro_batch_items": 1},
            ),
            small,
        )
        for staleness in (0, 1)
    )
    operations = 4 * 100 * GPU_CALL_S / 10
    assert operations > 4 * 3e9 / (GPU_FLOPS_SHARE * 67e12)
    reading = 4 * 5e4 * (2 / CORE_BANDWIDTH + 1 / 64e9)
    assert stale.actor_s - fresh.actor_s == pytest.approx(operations + reading)


def test_a_rank_holds_bank_encoder_and_its_share() -> None:
    step = step_of("h100:8", config_of())
    bank = ITEMS * (WIDTH * 4 + 8) + 5 * HEAD_BYTES
    encoder = 10**7 + 4 * 4 * 10**5
    encoding = 125 * (5e4 + 1e6)
    vectors = 4 * ITEMS * DIM * 4 + (3 + 2) * ITEMS * WIDTH * 4
    loss = 50 * ITEMS + 8 * ITEMS**2
    assert step.rank_bytes == pytest.approx(bank + encoder + encoding + vectors + loss)
    # A bank of very many items is copied whole when it is made anew.
    items = EVERY_ITEM.model_copy(update={"num_items": 10**9})
    large = step_of("h100:8", config_of(), COST.model_copy(update={"items": items}))
    copies = 10**9 * WIDTH * 4 * (1 + 2 / 8)
    assert large.rank_bytes == pytest.approx(
        10**9 * (WIDTH * 4 + 8) + 5 * HEAD_BYTES + encoder + copies
    )


def service(transport: str = "object_store", **changes: object) -> ContentConfig:
    return config_of(
        placement={"kind": "service", "num_actors": 4, "transport": transport, **changes}
    )


def test_ranks_of_a_service_do_not_run_the_encoder() -> None:
    step = step_of("h100:8", service(gpus_per_actor=1))
    inline = step_of("h100:8", config_of())
    assert inline.rank_bytes - step.rank_bytes == pytest.approx(
        10**7 + 4 * 4 * 10**5 + 125 * (5e4 + 1e6)
    )
    encoding = 250 * 7e9 / (GPU_FLOPS_SHARE * 67e12)
    reading = 250 * 5e4 * (2 / CORE_BANDWIDTH + 1 / 64e9)
    messages = (2 * 8 * 250 * WIDTH * 4 + 4 * 10**5 * 4) / CORE_BANDWIDTH
    assert step.actor_s == pytest.approx(encoding + reading + messages + 2 * 8 * 0.25e-3)
    loss = max(1.1e8 / (GPU_FLOPS_SHARE * 67e12), 60 * GPU_CALL_S / 10)
    ids = 7 / 8 * 8 * ITEMS * 8 / 450e9 + GPU_EXCHANGE_S
    calls = 2 * 4 * 0.25e-3 + 2 * ITEMS * WIDTH * 4 / CORE_BANDWIDTH
    head = 3 * GPU_CALL_S / 10 + 2 * 7 / 8 * HEAD_BYTES / 450e9 + GPU_EXCHANGE_S
    assert step.rank_s == pytest.approx(loss + head + ids + calls)
    # One after the other: the ranks wait for vectors of the weights after the last step.
    assert step.added_seconds(0.5) == pytest.approx(step.rank_s + step.actor_s)


def test_the_direct_transport_sends_vectors_once_for_all_ranks() -> None:
    """Over the network cards; calls are those of rank 0, whatever the number of ranks."""
    few, many = (
        step_of(name, service("direct", gpus_per_actor=1)) for name in ("h100:8", "h100:4x8")
    )
    encoding = 250 * 7e9 / (GPU_FLOPS_SHARE * 67e12)
    reading = 250 * 5e4 * (2 / CORE_BANDWIDTH + 1 / 64e9)
    moved = (2 * 250 * WIDTH * 4 + 2 * 3 / 4 * 10**5 * 4) / 50e9
    talk = 3 * 0.25e-3 + 3 * GPU_EXCHANGE_S
    for step in (few, many):
        assert step.actor_s == pytest.approx(encoding + reading + moved + talk)
    loss = max(1.1e8 / (GPU_FLOPS_SHARE * 67e12), 60 * GPU_CALL_S / 10)
    ids = 7 / 8 * 8 * ITEMS * 8 / 450e9 + GPU_EXCHANGE_S
    calls = 4 * (3 * 0.25e-3 + 2 * GPU_EXCHANGE_S) + 2 * ITEMS * WIDTH * 4 / 50e9
    head = 3 * GPU_CALL_S / 10 + 2 * 7 / 8 * HEAD_BYTES / 450e9 + GPU_EXCHANGE_S
    assert few.rank_s == pytest.approx(loss + head + ids + calls)


def test_the_transport_of_a_step_is_the_one_that_devices_allow() -> None:
    for changes, same in (
        ({"gpus_per_actor": 1}, "direct"),
        ({"gpus_per_actor": 0.5}, "object_store"),
        ({}, "object_store"),
    ):
        chosen, expected = (step_of("h100:8", service(t, **changes)) for t in ("auto", same))
        assert chosen == expected, changes
    assert step_of("cpu:2", service("auto")) == step_of("cpu:2", service("object_store"))


def test_stale_vectors_are_made_beside_the_ranks_and_once_more_for_backward() -> None:
    fresh, stale = (step_of("h100:8", service(gpus_per_actor=1, staleness=s)) for s in (0, 1))
    again = 250 * (3e9 / (GPU_FLOPS_SHARE * 67e12) + 5e4 * (2 / CORE_BANDWIDTH + 1 / 64e9))
    assert stale.actor_s == pytest.approx(fresh.actor_s + again)
    slow_ranks = 10 * stale.actor_s
    assert stale.added_seconds(slow_ranks) == pytest.approx(stale.rank_s)
    assert stale.added_seconds(0.0) == pytest.approx(stale.actor_s)


def test_actors_without_gpus_run_on_cores() -> None:
    one, two = (step_of("h100:8", service(cpus_per_actor=n)) for n in (1, 2))
    assert one.actor_s - two.actor_s == pytest.approx(250 * 0.03 / 2)
    shared = step_of("h100:8", service(gpus_per_actor=0.5)).actor_s
    alone = step_of("h100:8", service(gpus_per_actor=1)).actor_s
    encoding = 250 * 7e9 / (GPU_FLOPS_SHARE * 67e12)
    reading = 250 * 5e4 * (2 / CORE_BANDWIDTH + 1 / 64e9)
    assert shared - alone == pytest.approx(encoding + reading)


def test_a_frozen_encoder_costs_a_step_its_last_layer() -> None:
    """The bank is filled once: nothing is encoded, exchanged or waited for."""
    lora = {"text": {"lora": None}, "frozen": True, "cic": None}
    cost = COST.model_copy(update={"cic": None})
    inline = step_of("h100:1", config_of(**lora), cost)
    assert inline.items.encoded == 0
    assert inline.rank_s == pytest.approx(3 * GPU_CALL_S / 10)
    assert inline.added_seconds(0.5) == pytest.approx(inline.rank_s)
    trained = step_of("h100:1", config_of(cic=None), cost)
    encoding = ITEMS * (5e4 + 1e6) + 2 * ITEMS * WIDTH * 4
    assert trained.rank_bytes - inline.rank_bytes == pytest.approx(encoding)


# --- points --------------------------------------------------------------------------------------

CONTENT = "content={text: {max_tokens: 8}, image: {image_size: 16}, dim: 16}"
IN_PIECES = "content.gradient.micro_batch_items=16"


def request_of(shape: ClusterShape, *overrides: str) -> CapacityRequest:
    recipe = load_recipe("demo", [CONTENT, *overrides])
    return CapacityRequest(
        recipe=recipe, shapes=(shape,), batch_sizes=(512,), dense={1.0: DENSE}, content=COST
    )


def point_on(shape: ClusterShape, *overrides: str) -> CapacityPoint:
    key = PointKey(shape=shape, batch_size_per_rank=512, growth=1.0, dim_factor=1.0)
    return evaluate_point(request_of(shape, *overrides), key)


def test_a_point_adds_content_to_time_and_memory() -> None:
    shape = parse_shape("h100:8")
    request = request_of(shape)
    key = PointKey(shape=shape, batch_size_per_rank=512, growth=1.0, dim_factor=1.0)
    with_content = evaluate_point(request, key)
    without = evaluate_point(
        request.model_copy(update={"recipe": load_recipe("demo"), "content": None}), key
    )
    assert request.recipe.content is not None
    step = content_step(COST, request.recipe.content, shape, 512)
    assert with_content.content_s == step.rank_s
    assert with_content.step_s == pytest.approx((without.step_s or 0) + step.rank_s)
    assert with_content.rows_per_s == pytest.approx(8 * 512 / (with_content.step_s or 1))
    assert with_content.content_items == step.items.encoded
    assert with_content.peak_bytes == pytest.approx((without.peak_bytes or 0) + step.rank_bytes)
    assert with_content.headroom == pytest.approx(
        (without.headroom or 0) - step.rank_bytes / shape.device_bytes
    )
    assert step.copy_bytes == ITEMS * (WIDTH * 4 + 8) + 3 * (4 * 10**5 + HEAD_BYTES)
    copied = (with_content.host_bytes or 0) - (without.host_bytes or 0)
    assert copied == pytest.approx(step.copy_bytes, abs=1)
    assert without.content_s is None
    assert with_content.content_actor_s is None

    said = answer_of((with_content,), with_content, Target(), request.recipe)
    assert f"{1e3 * step.rank_s:.3g} ms content" in said
    assert f"each rank encodes {step.items.encoded / 8:,.0f} items a step" in said
    assert "content" not in answer_of((without,), without, Target())


def test_a_service_s_own_devices_are_named() -> None:
    override = "content.placement={kind: service, num_actors: 3, gpus_per_actor: 1}"
    shape = parse_shape("h100:8")
    point = point_on(shape, override)
    recipe = load_recipe("demo", [CONTENT, override])
    said = answer_of((point,), point, Target(), recipe)
    assert "each of 3 actors encodes" in said
    assert "they need 3 GPUs and 3 CPUs beside the cluster" in said
    assert point.content_actor_s is not None


def small_gpus(hbm_bytes: int) -> ClusterShape:
    machine = find_machine("h100").model_copy(update={"hbm_bytes": hbm_bytes})
    return ClusterShape(machine=machine, ranks_per_host=2)


def test_tables_get_the_memory_that_content_leaves() -> None:
    """A bank that grows with the tables ends their growth earlier, and is never planned over."""
    shape = small_gpus(256 << 20)
    request = request_of(shape, IN_PIECES).model_copy(update={"kernels": ("fused",)})
    key = PointKey(shape=shape, batch_size_per_rank=512, growth=1.0, dim_factor=1.0)
    without = {"recipe": load_recipe("demo"), "content": None}
    alone = evaluate_point(request.model_copy(update=without), key)
    beside = evaluate_point(request, key)
    assert beside.refusal is None
    assert beside.breaks_at_growth is not None
    assert alone.breaks_at_growth is not None
    assert 1 < beside.breaks_at_growth < alone.breaks_at_growth
    later = evaluate_point(request, key.model_copy(update={"growth": beside.breaks_at_growth}))
    assert later.refusal is None
    assert (later.headroom or 0) >= 0


def test_content_that_fills_a_rank_is_a_refusal_with_the_remedy() -> None:
    shape = small_gpus(12 << 20)
    point = point_on(shape)
    assert point.refusal is not None
    assert "what is no table takes" in point.refusal
    assert "content.gradient.micro_batch_items" in point.refusal


def test_a_run_and_braid_plan_leave_content_the_room_that_capacity_does(tmp_path: Path) -> None:
    """They left it a share of the memory: another plan than the one that was recommended."""
    shape, recipe = small_gpus(1 << 30), load_recipe("demo", [CONTENT, f"data.root={tmp_path}"])
    assert recipe.content is not None
    batch_size = recipe.ranking.trainer.batch_size_per_rank
    swept = CapacityRequest(
        recipe=recipe,
        shapes=(shape,),
        batch_sizes=(batch_size,),
        dense={1.0: DENSE},
        content=content_cost(recipe, recipe.content, None, timed=False),
    )
    key = PointKey(shape=shape, batch_size_per_rank=batch_size, growth=1.0, dim_factor=1.0)
    capacity = _request_of(swept, key)

    of_run = with_reserve(plan_request(recipe, shape), recipe)
    of_plan = changed_request(recipe, shape, RequestChanges())

    assert of_run.reserved_bytes == of_plan.reserved_bytes == capacity.reserved_bytes
    assert (of_run.reserved_bytes or 0) > RESERVED_SHARE * shape.device_bytes
    assert plan_tables(of_run) == plan_tables(of_plan) == plan_tables(capacity)


def test_a_run_is_refused_where_content_fills_the_ranks(tmp_path: Path) -> None:
    settings = [CONTENT, "embedding.sharding.hbm_gib=0.01", f"data.root={tmp_path}"]
    recipe = load_recipe("demo", settings)
    with pytest.raises(UserError, match="what is no table takes .*micro_batch_items"):
        plan_recipe(recipe, ranks_per_host=2)


def test_a_plan_with_content_is_another_one() -> None:
    small, large = (
        plan_config(load_recipe("demo", [CONTENT, f"content.gradient.max_items_per_step={n}"]))
        for n in (8, 64)
    )
    assert small != large
    assert "content" not in plan_config(load_recipe("demo"))


def test_planning_leaves_what_a_process_draws_as_it_was(tmp_path: Path) -> None:
    recipe = load_recipe("demo", [CONTENT, f"data.root={tmp_path}"])
    assert recipe.content is not None
    before = torch.random.get_rng_state()
    found = content_cost(recipe, recipe.content, None, timed=False)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert found.encoder.forward_s == found.encoder.head_s == 0.0
    assert found.encoder.activation_bytes > 0


def test_a_tower_that_is_not_there_is_said_before_anything_starts() -> None:
    nowhere = ["content.text={}", "content.image.model=./nowhere"]
    recipe = load_recipe("movielens_content", nowhere)
    with pytest.raises(UserError) as raised:
        sweep_request(recipe, SweepOptions(("h100:8",)))
    said = str(raised.value)
    assert "content.image" in said
    assert "'./nowhere': there is no such directory" in said
    assert "--set content.image=null" in said
    assert "\n" not in said
    without = load_recipe("movielens_content", ["content.text={}", "content.image=null"])
    assert sweep_request(without, SweepOptions(("h100:8",))).recipe.content is not None


def test_a_service_on_gpus_needs_a_topology_that_has_some() -> None:
    override = "content.placement={kind: service, gpus_per_actor: 1}"
    recipe = load_recipe("demo", [CONTENT, override])
    with pytest.raises(UserError, match=r"gpus_per_actor=1: .*cpu:2 has none; set it to 0"):
        sweep_request(recipe, SweepOptions(("h100:8", "cpu:2")))


def test_a_direct_transport_needs_topologies_that_allow_it() -> None:
    override = "content.placement={kind: service, transport: direct}"
    recipe = load_recipe("demo", [CONTENT, override])
    refusal = r"transport=direct: on h100:8 the ranks run on GPUs .*gpus_per_actor to 1"
    with pytest.raises(UserError, match=refusal):
        sweep_request(recipe, SweepOptions(("cpu:2", "h100:8")))


def test_costs_of_a_recipe_are_taken_from_its_towers_and_ranker(tmp_path: Path) -> None:
    recipe = load_recipe("demo", [CONTENT, f"data.root={tmp_path}"])
    assert recipe.content is not None
    found = content_cost(recipe, recipe.content, None)
    assert found.items.num_items == recipe.features.table("item").num_embeddings
    # At least the feed-forward blocks of both layers: 8 words, 4 patches and a class token.
    assert found.encoder.forward_flops > (8 + 5) * 2 * 2 * 32 * 64
    assert found.cic is not None

    plain = dense_cost(load_recipe("demo"), None)
    dense = dense_cost(recipe, None, found)
    # Queries and keys of one history, and the classifier's wider input; the heads of the loss.
    assert dense.parameters > plain.parameters + 2 * 16 * 16 + found.cic.parameters
    assert dense.flops_per_row > plain.flops_per_row + 3 * 2 * 16 * 16
    lone = found.model_copy(update={"cic": None})
    assert dense_cost(recipe, None, lone).parameters == dense.parameters - found.cic.parameters
