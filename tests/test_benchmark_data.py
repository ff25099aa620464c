from pathlib import Path

import pyarrow.parquet as pq
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_grown_tables_are_looked_up_over_all_their_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import peers

    grown = 50_000_000
    tables = [grown, *peers.ROWS_PER_TABLE[1:]]
    peers.write_data(tmp_path / "grown.parquet", tables, 20_000, seed=1)
    peers.write_data(tmp_path / "usual.parquet", peers.ROWS_PER_TABLE, 20_000, seed=1)
    of_grown, of_usual = (
        pq.read_table(tmp_path / f"{name}.parquet") for name in ("grown", "usual")
    )

    ids = of_grown["sparse:s0"].to_numpy()
    # 20,000 uniform draws fall into each quarter 5,000 times, give or take 61.
    quarters = [int(((ids >= q * grown / 4) & (ids < (q + 1) * grown / 4)).sum()) for q in range(4)]
    assert sum(quarters) == len(ids)
    assert all(abs(count - 5_000) < 400 for count in quarters)
    assert of_usual["sparse:s0"].to_numpy().max() < peers.ROWS_PER_TABLE[0]
    for table in range(1, len(tables)):
        assert of_grown[f"sparse:s{table}"] == of_usual[f"sparse:s{table}"]
