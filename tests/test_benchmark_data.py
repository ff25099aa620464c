"""What benchmarks draw and sum up, without running them."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from pipeline.study.statistics import StudyResult, differences, estimates

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


@pytest.mark.parametrize(
    ("name", "options", "parts"),
    [
        ("peers", [], ["--fuxictr-python is not given", "--fuxictr-models DIR", "docs/peers.md"]),
        ("peers", ["--fuxictr-python", "/no/python"], ["/no/python does not exist"]),
        (
            "content_cost",
            ["--image-model", "/no/model"],
            ["error: tower model", "make towers", "--image-model DIR", "facebook/dinov2-small"],
        ),
    ],
)
def test_a_benchmark_says_what_it_needs_and_where_to_get_it(
    name: str,
    options: list[str],
    parts: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--quick", *options])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main()

    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert all(part in said for part in parts)


def test_a_classifier_whose_trials_all_failed_leaves_the_others_in_the_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setitem(sys.modules, "lightgbm", ModuleType("lightgbm"))  # in no test environment
    import classifiers

    def trials(auc: float) -> dict[int, dict[str, float]]:
        return {seed: {"use.auc": auc + seed / 100, "use.logloss": 0.5} for seed in (0, 1)}

    by_variant = {"fm": trials(0.6), "fm+fgcnn": trials(0.7), "dnn": trials(0.8), "dnn+fgcnn": {}}
    result = StudyResult(
        recipe="r",
        date="2015-01-02",
        seeds=(0, 1),
        variants={name: estimates(by_seed) for name, by_seed in by_variant.items()},
        paired={n: differences(by, by_variant["fm"]) for n, by in by_variant.items() if n != "fm"},
        overrides=dict.fromkeys(by_variant, ()),
        failed={f"dnn+fgcnn/seed-{seed}": "diverged" for seed in (0, 1)},
    )
    figures = {kind: classifiers.compared(result, kind) for kind in ("fm", "dnn")}
    figures["gbdt"] = {"use.auc": [0.9], "use.logloss": [0.2]}

    console = Console(width=160)
    with console.capture() as captured:
        console.print(classifiers.summary(figures, ["fm", "dnn"], 2))
    rows = [line.split() for line in captured.get().replace("\u2502", " ").splitlines()]
    cells = {row[0]: row[1:] for row in rows if row}
    assert cells["fm"][:3] == ["0.6050", "0.7050", "+0.1000"]
    assert cells["dnn"] == ["0.8050", "-", "-", "0.5000", "-", "-"]
