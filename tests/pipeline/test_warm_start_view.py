"""The line that says what a warm start took over."""

from pipeline.warm_start_view import redrawn_rows, warm_start_line


def facts(**initialised: str) -> dict:
    return {
        "carried": ["tables/item", "dense/a", "dense/b"],
        "initialised": initialised,
        "ignored": [],
        "dropped_ids": {"user": 7, "item": 0},
    }


def test_line_counts_and_names_what_is_redrawn() -> None:
    report = facts(**{"tables/city": "not in the checkpoint", "dense/mlp.0": "shape changed"})

    assert warm_start_line(report, "2024-01-06") == (
        "warm start from 2024-01-06: carried 3, redrawn 2 (tables/city, dense/mlp.0)"
    )
    assert warm_start_line(facts(), "2024-01-06").endswith("carried 3, redrawn 0")


def test_line_counts_the_rows_of_code_tables() -> None:
    rows = {
        "sid_0": {"carried": 7, "sourced": 2, "redrawn": 0},
        "vq": {"carried": 40, "sourced": 5, "redrawn": 3},
    }
    line = warm_start_line({**facts(), "rows": rows}, "d")
    assert line.endswith(
        "redrawn 0; rows of 2 code tables: 47 go on, 7 start from the most similar row, 3 anew"
    )


def test_line_stays_short_and_the_rows_have_everything() -> None:
    report = facts(**{f"dense/{i}": f"shape changed from {i}" for i in range(9)})

    assert warm_start_line(report, "d").endswith("dense/4, dense/5 and 3 more)")
    rows = redrawn_rows(report)
    assert [row["why"] for row in rows[:9]] == [f"shape changed from {i}" for i in range(9)]
    assert rows[9:] == [{"name": "tables/user", "why": "7 ids of the earlier run found no room"}]
