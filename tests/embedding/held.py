"""What a checkpoint must carry: gathered from all ranks, saved beside it, compared after a load."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from embedding.checkpoint import Checkpointer
from embedding.hashing import NO_ID
from embedding.id_map import by_row, managed_modules
from embedding.shard import Sharded
from tests.embedding.toy import WholeTable, device_of, gather_tables, toy_batch

NUM_IDS = 8  # few enough that every id owns a row
STATE_TOLERANCE = 1e-6  # a mean of float32 accumulators, summed in another order


def save(sharded: Sharded, directory: Path) -> None:
    checkpointer = Checkpointer(directory, keep=1)
    checkpointer.save(3, sharded, {})
    checkpointer.close()
    held = _held(sharded)
    if dist.get_rank() == 0:
        torch.save(held, directory / "held.pt")
    dist.barrier()


def load_and_compare(sharded: Sharded, directory: Path) -> None:
    checkpointer = Checkpointer(directory, keep=1)
    checkpointer.load(3, sharded)
    checkpointer.close()
    expected, held = torch.load(directory / "held.pt", weights_only=False), _held(sharded)
    place = f"{directory.name} -> {[t.sharding for t in sharded.plan.tables]}"
    for name, table in held["tables"].items():
        _compare_table(table, expected["tables"][name], f"{place}: {name}")
    for name, rows in held["ids"].items():
        assert rows.keys() == expected["ids"][name].keys(), f"{place}: ids of {name}"
        assert rows, f"{place}: no id of {name} owns a row"
        for raw_id, values in rows.items():
            torch.testing.assert_close(values, expected["ids"][name][raw_id], rtol=0, atol=0)
    for key in ("dense", "dense_states"):
        torch.testing.assert_close(held[key], expected[key], rtol=0, atol=0)
    if held["ids"]:
        torch.testing.assert_close(held["logits"], expected["logits"], rtol=1e-5, atol=1e-6)


def _held(sharded: Sharded) -> dict:
    """Everything a checkpoint must carry, gathered from all ranks into plain objects."""
    tables = gather_tables(sharded)
    ids = {
        name: _rows_by_id(sharded, name, tables[name]) for name in managed_modules(sharded.model)
    }
    sharded.model.eval()
    with torch.no_grad():
        logits = sharded.model(toy_batch(sharded.schema, 5, NUM_IDS).to(device_of(sharded)))
    sharded.model.train()
    state = sharded.dense_optimizer.state
    return {
        # Managed tables change their row numbers; they are compared by id.
        "tables": {name: table for name, table in tables.items() if name not in ids},
        "ids": ids,
        "logits": logits.cpu(),
        "dense": {n: p.detach().to("cpu", copy=True) for n, p in sharded.dense_parameters.items()},
        "dense_states": {
            n: {k: v.to("cpu", copy=True) for k, v in state[p].items()}
            for n, p in sharded.dense_parameters.items()
            if p in state
        },
    }


def _rows_by_id(sharded: Sharded, name: str, table: WholeTable) -> dict[int, dict[str, Tensor]]:
    module = managed_modules(sharded.model)[name]
    local = (
        module._output_global_offset,
        {k: v.to("cpu", copy=True) for k, v in by_row(module).items()},
    )
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, local)
    rows = {}
    for offset, state in gathered:
        for row, raw_id in enumerate(state["ids"].tolist()):
            if raw_id != NO_ID:
                states = {
                    key: value[offset + row]
                    for key, spans in table.states.items()
                    for value in spans.values()
                }
                metadata = {key: value[row] for key, value in state.items() if key != "ids"}
                rows[raw_id] = {"weight": table.weight[offset + row], **states, **metadata}
    return rows


def _compare_table(held: WholeTable, expected: WholeTable, place: str) -> None:
    torch.testing.assert_close(held.weight, expected.weight, rtol=0, atol=0, msg=place)
    assert held.states.keys() == expected.states.keys(), place
    for name, spans in held.states.items():
        # Spread every accumulator over its columns; a merged one is then the mean of its columns.
        spread = torch.full_like(expected.weight, torch.nan)
        for (start, stop), value in expected.states[name].items():
            spread[:, start:stop] = value if value.dim() == 2 else value[:, None]
        for (start, stop), value in spans.items():
            target = spread[:, start:stop]
            target = target if value.dim() == 2 else target.mean(dim=1)
            torch.testing.assert_close(value, target, rtol=STATE_TOLERANCE, atol=0, msg=place)
