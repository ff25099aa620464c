"""Join with codes against a loop over events and the rows of the codes artifact."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from small_log import DAYS, event, make_recipe, run_here, write_catalogue, write_day

from pipeline.codes.features import NearItems, codes_table
from pipeline.config import Recipe
from pipeline.samples import ingest as ingest_module
from pipeline.samples import join as join_module
from pipeline.samples.ingest import check_span, ingest
from pipeline.samples.join import join

FAMILIES = ["candidate", "history", "shared", "user"]
CODES = {
    **{"rq": {"num_levels": 2, "codebook_size": 4}, "vq": {"max_items": 9, "top_k": 2}},
    **{"suffix": {"num_codes": 3}, "features": {"families": FAMILIES, "histories": ["clicks"]}},
    "vectors": {"kind": "column"},
}
SID = {1: (0, 1, 2), 3: (0, 1, 0), 4: (0, 3, 1), 5: (2, 3, 0)}  # item 2 has no codes
NEAR = {1: [1, 2], 3: [0, 2], 4: [3, 1], 5: [2, 0]}
OWN = {1: 0, 3: 1, 4: 2, 5: -1}  # item 5 is not in the codebook


@pytest.fixture
def samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Samples of a day with the ingested histories beside them."""
    for module in (ingest_module, join_module):
        monkeypatch.setattr(module, "stream_tasks", run_here)
    root = tmp_path / "data"
    write_catalogue(root, num_items=5)
    rows = [
        event(0, 1 + s % 2, s, item_id=1 + (s * s) % 5, click=int(s % 3 > 0), request_id=s)
        for s in range(24)
    ]
    write_day(root, 0, [rows])
    data = make_recipe(root).model_dump(mode="json")
    recipe = Recipe.model_validate({**data, "codes": CODES})
    ids = np.array(sorted(SID))
    codes = np.array([SID[i] for i in sorted(SID)], np.int32)
    near = np.array([NEAR[i] for i in sorted(SID)], np.int32)
    path = tmp_path / "codes.parquet"
    own = np.array([OWN[i] for i in sorted(SID)])
    pq.write_table(codes_table(ids, codes[:, :2], codes[:, 2], NearItems(own, near)), path)
    for name in ("ingest", "join"):
        (tmp_path / name).mkdir()
    ingest(recipe, check_span(recipe, DAYS[:1], None), tmp_path / "ingest")
    join(recipe, tmp_path / "ingest", tmp_path / "join", codes=path)
    pairs = []
    for file in sorted((tmp_path / "ingest" / "events").glob("dt=*/*.parquet")):
        own = tmp_path / "join" / "samples" / file.parent.name / file.name
        past = pq.ParquetFile(file).read().column("history:clicks:item_id").to_pylist()
        rows = pq.ParquetFile(own).read().to_pylist()
        pairs += [{**row, "past": items} for row, items in zip(rows, past, strict=True)]
    return pairs


def test_derived_columns_equal_a_loop(samples: list[dict[str, Any]]) -> None:
    assert len(samples) == 24
    shared_at_all = 0
    for row in samples:
        item, past = row["key:item_id"], row["past"]
        sid = SID.get(item, (-1, -1, -1))
        assert [row["sparse:sid_0"], row["sparse:sid_1"], row["sparse:sid_suffix"]] == [*sid]
        assert row["sparse:vq"] == NEAR.get(item, [-1])
        for level in (0, 1):
            expected = [SID.get(i, (-1, -1))[level] for i in past]
            assert row[f"sequence:clicks_sid_{level}"] == expected
        nearest = {**OWN, 5: NEAR[5][0]}
        assert row["sequence:clicks_vq"] == [nearest.get(i, -1) for i in past]
        for depth in (1, 2):
            shared = [i for i in past if i in SID and item in SID and SID[i][:depth] == sid[:depth]]
            assert row[f"sparse:clicks_shared_{depth}"] == shared
            count = row[f"dense:clicks_shared_{depth}_count"]
            assert count == pytest.approx(math.log(1 + len(shared)), abs=1e-6)
            shared_at_all += len(shared)
    assert shared_at_all > 10


def test_user_codes_are_one_id_a_user_and_prefix(samples: list[dict[str, Any]]) -> None:
    for depth in (1, 2):
        found: dict[tuple, set[int]] = {}
        for row in samples:
            sid, value = SID.get(row["key:item_id"]), row[f"sparse:user_code_{depth}"]
            if sid is None:
                assert value == -1
            else:
                found.setdefault((row["key:user_id"], *sid[:depth]), set()).add(value)
        assert all(len(ids) == 1 for ids in found.values())
        assert len(set.union(*found.values())) == len(found)
