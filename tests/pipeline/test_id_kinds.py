"""Id columns that files and days write in different ways: alike where they can be, else refused."""

import shutil
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_log
from small_log import DAYS, Row, event, make_recipe, write_catalogue, write_day

from embedding.batch import RankingBatch
from embedding.errors import UserError
from embedding.feature_schema import FeatureSchema
from embedding.loader import SampleFiles, SampleLoader
from pipeline.artifacts import MANIFEST, Manifest, read_manifest
from pipeline.config import Recipe
from pipeline.samples import ingest as ingest_module
from pipeline.samples import join as join_module
from pipeline.samples.columns import ColumnKind
from pipeline.samples.ingest import check_span, ingest
from pipeline.samples.ingest_facts import IngestFacts
from pipeline.samples.join import join


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (ingest_module, join_module):
        monkeypatch.setattr(module, "stream_tasks", small_log.run_here)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three days of two files each."""
    root = tmp_path / "data"
    write_catalogue(root)
    for day in range(3):
        rows = [
            event(day, 1 + s % 3, s, item_id=1 + s % 4, click=[1, 0, None][s % 3])
            | {"request_id": 100 * day + s, "device": f"device {s % 2}"}
            for s in range(12)
        ]
        write_day(root, day, [rows[:6], rows[6:]])
    return root


def event_file(root: Path, day: int, part: int) -> Path:
    return root / "events" / f"dt={DAYS[day]}" / f"part-{part:05d}.parquet"


def rewrite(path: Path, name: str, values: pa.Array | pa.DataType) -> None:
    """Put other values, or another type, into a column."""
    table = pq.ParquetFile(path).read()
    column = values if isinstance(values, pa.Array) else table[name].cast(values)
    pq.write_table(table.set_column(table.column_names.index(name), name, column), path)


def run(recipe: Recipe, spans: Sequence[Sequence[str]], folder: Path) -> list[Row]:
    """Samples by request, of spans that are ingested and joined one after the other."""
    samples: list[Row] = []
    previous = None
    for span in spans:
        ingested, joined = (folder / span[-1] / stage for stage in ("ingest", "join"))
        ingested.mkdir(parents=True)
        joined.mkdir()
        facts: IngestFacts = ingest(recipe, check_span(recipe, span, previous), ingested)
        manifest = Manifest(stage="ingest", artifact_id="", config_hash="", facts=facts)
        (ingested / MANIFEST).write_text(manifest.model_dump_json())
        join(recipe, ingested, joined)
        for path in joined.glob("samples/*/*.parquet"):
            samples += pq.ParquetFile(path).read().to_pylist()
        previous = ingested
    return sorted(samples, key=lambda row: row["key:request_id"])


def recipe_of(root: Path, *more: dict[str, Any], **changes: Any) -> Recipe:
    """The small recipe with more sparse features of the events, or other parts of features."""
    recipe = make_recipe(root).model_dump(mode="json")
    recipe["features"]["sparse"] += more
    recipe["features"] |= changes
    return Recipe.model_validate(recipe)


# --- labels that a history carries ---------------------------------------------------------------


def past_label_recipe(root: Path) -> Recipe:
    past_click = {"name": "past_click", "history": "seen", "table": "stars"}
    sequences = make_recipe(root).model_dump(mode="json")["features"]["sequences"]
    return recipe_of(
        root, sequences=[*sequences, {**past_click, "source": "events", "column": "click"}]
    )


@pytest.mark.parametrize("kind", [pa.decimal128(10, 2), pa.float64(), pa.bool_()])
def test_a_label_of_any_numbers_is_carried_as_one_of_integers(
    root: Path, tmp_path: Path, kind: pa.DataType
) -> None:
    recipe = past_label_recipe(root)
    expected = run(recipe, [DAYS[:2], DAYS[2:3]], tmp_path / "integers")
    assert {label for row in expected for label in row["sequence:past_click"]} == {-1, 0, 1}
    for day, part in ((0, 1), (1, 0), (2, 0), (2, 1)):  # within a span, and from one to the next
        rewrite(event_file(root, day, part), "click", kind)

    assert run(recipe, [DAYS[:2], DAYS[2:3]], tmp_path / "others") == expected


def test_a_label_of_integers_goes_on_from_days_that_told_another_kind(
    root: Path, tmp_path: Path
) -> None:
    """Labels with fractions were once recorded as strings."""
    recipe = past_label_recipe(root)
    run(recipe, [DAYS[:1]], tmp_path)
    previous = tmp_path / DAYS[0] / "ingest"
    manifest = read_manifest(previous, IngestFacts)
    assert manifest is not None
    told = manifest.facts.event_columns | {"click": ColumnKind(values="string")}
    facts = manifest.facts.model_copy(update={"event_columns": told})
    changed = manifest.model_copy(update={"facts": facts})
    (previous / MANIFEST).write_text(changed.model_dump_json())
    for part in (0, 1):
        rewrite(event_file(root, 1, part), "click", pa.nulls(6))

    kinds = check_span(recipe, DAYS[1:2], previous).kinds

    assert kinds["click"] == ColumnKind(values="integer"), "although this day has nulls alone"


def test_a_decimal_label_of_another_number_goes_to_quarantine(root: Path, tmp_path: Path) -> None:
    labels = [Decimal("0.50"), Decimal("1.00"), None, Decimal(0), Decimal(1), Decimal("-1.00")]
    rewrite(event_file(root, 0, 0), "click", pa.array(labels, pa.decimal128(3, 2)))

    samples = run(past_label_recipe(root), [DAYS[:1]], tmp_path)

    assert [row["key:request_id"] for row in samples] == list(range(1, 5)) + list(range(6, 12))
    assert [row["label:click"] for row in samples[:4]] == [1, None, 0, 1]


# --- integers or strings -------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["user_id", "device"])
def test_a_day_that_writes_an_id_in_another_way_is_refused(
    root: Path, tmp_path: Path, column: str
) -> None:
    """Also after a day of nulls, which tells nothing."""
    recipe = make_recipe(root)
    kind, other = (pa.string(), "integer") if column == "user_id" else (pa.int64(), "string")
    for part in (0, 1):
        rewrite(event_file(root, 2, part), column, pa.array(["7"] * 6).cast(kind))
        if column == "device":
            rewrite(event_file(root, 1, part), column, pa.nulls(6))
    spans = [DAYS[:1], DAYS[1:2]]
    assert len(run(recipe, spans, tmp_path)) == 24

    previous = tmp_path / DAYS[1] / "ingest"
    with pytest.raises(UserError) as refused:
        check_span(recipe, DAYS[2:3], previous)

    said = str(refused.value)
    assert f"column '{column}' holds {other}s in the events up to {DAYS[1]}" in said
    assert str(previous) in said
    assert f" in {event_file(root, 2, 0)}, which are never equal ids; write it alike" in said


@pytest.mark.parametrize("source", ["items", "users"])
def test_a_catalogue_that_writes_its_ids_in_another_way_is_refused(root: Path, source: str) -> None:
    """Else every row would lack its catalogue row, and nobody would know why."""
    key, path = f"{source.removesuffix('s')}_id", root / f"{source}.parquet"
    rewrite(path, key, pa.string())

    with pytest.raises(UserError) as refused:
        check_span(make_recipe(root), DAYS[:1], None)

    assert f"column '{key}' holds integers in {event_file(root, 0, 0)} and strings in {path}" in (
        str(refused.value)
    )


# --- lists and single ids ------------------------------------------------------------------------

WORDS = {"name": "words", "table": "device"}


def add_words(root: Path, day: int, part: int, words: pa.Array) -> None:
    path = event_file(root, day, part)
    pq.write_table(pq.ParquetFile(path).read().append_column("words", words), path)


def words_of(row: int) -> list[str] | None:
    return [None, [], ["a"], ["a", "b"]][row % 4]


@pytest.mark.parametrize("spans", [[DAYS[:2]], [DAYS[:1], DAYS[1:2]], [DAYS[1:2], DAYS[2:3]]])
def test_nulls_and_single_ids_are_lists_where_other_files_hold_lists(
    root: Path, tmp_path: Path, spans: list[list[str]]
) -> None:
    lists = pa.array([words_of(row) for row in range(6)], pa.list_(pa.string()))
    empty = pa.array([[]] * 6, pa.list_(pa.null()))
    singles = ["x", None, "y", "y", "x", None]
    one_each = pa.array([None if x is None else [x] for x in singles], pa.list_(pa.string()))
    files = [
        [(pa.nulls(6), pa.nulls(6, lists.type)), (pa.nulls(6), pa.nulls(6, lists.type))],
        [(lists, lists), (pa.array(singles), one_each)],
        [(empty, pa.array([[]] * 6, lists.type)), (pa.nulls(6), pa.nulls(6, lists.type))],
    ]
    alike = tmp_path / "alike"
    shutil.copytree(root, alike)
    for day, parts in enumerate(files):
        for part, (mixed, as_lists) in enumerate(parts):
            add_words(root, day, part, mixed)
            add_words(alike, day, part, as_lists)

    run(recipe_of(root, WORDS), spans, tmp_path / "mixed")
    run(recipe_of(alike, WORDS), spans, tmp_path / "lists")

    features = recipe_of(root, WORDS).features
    found, expected = (
        batch_of(sorted((tmp_path / name).rglob("samples/*/*.parquet")), features)
        for name in ("mixed", "lists")
    )
    assert found.pooled.to_dict()["words"].lengths().max() == 2
    for name, jagged in expected.pooled.to_dict().items():
        assert found.pooled[name].lengths().tolist() == jagged.lengths().tolist()
        assert found.pooled[name].values().tolist() == jagged.values().tolist()


def batch_of(paths: list[Path], features: FeatureSchema) -> RankingBatch:
    files = SampleFiles(paths, features, ["click"])
    with SampleLoader(files, batch_size_per_rank=files.num_rows).sequential() as stream:
        (batch,) = stream
    return batch


def test_a_column_of_lists_stays_one_on_days_of_nulls(root: Path, tmp_path: Path) -> None:
    """Requests are compared with what the last day held."""
    recipe = recipe_of(root, WORDS)
    for part in (0, 1):
        add_words(root, 0, part, pa.array([["a", "b"]] * 6))
        add_words(root, 1, part, pa.nulls(6))

    samples = run(recipe, [DAYS[:1], DAYS[1:2]], tmp_path)

    assert [row["sparse:words"] for row in samples[12:]] == [[-1]] * 12
    manifest = read_manifest(tmp_path / DAYS[1] / "ingest", IngestFacts)
    assert manifest is not None
    assert manifest.facts.event_columns["words"] == ColumnKind(values="string", is_list=True)
