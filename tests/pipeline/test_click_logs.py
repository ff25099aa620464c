"""Frappe, Criteo and Avazu on tiny files in their public formats."""

import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as pa_dataset
import pyarrow.parquet as pq
import pytest

from embedding.errors import UserError
from pipeline.adapters.avazu import import_avazu
from pipeline.adapters.criteo import CATEGORIES, INTEGERS, import_criteo
from pipeline.adapters.frappe import CONTEXT, import_frappe
from pipeline.recipe import load_recipe
from pipeline.samples.ingest import check_span


def read_events(root: Path) -> pd.DataFrame:
    events = pa_dataset.dataset(root / "events", partitioning="hive").to_table().to_pandas()
    return events.assign(dt=events.dt.astype(str))


# --- criteo --------------------------------------------------------------------------------------


def criteo_line(row: int) -> str:
    integers = ["" if (row + i) % 3 == 0 else str(row * i - 2) for i in range(13)]
    categories = ["" if (row + i) % 4 == 0 else f"{row * 1000003 + i:08x}" for i in range(26)]
    return "\t".join([str(row % 2), *integers, *categories])


def write_criteo(path: Path, rows: range, last: str = "\n") -> None:
    path.parent.mkdir(exist_ok=True)
    data = ("\n".join(criteo_line(row) for row in rows) + last).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.mark.parametrize("name", ["train.txt", "train.txt.gz"])
def test_criteo_rows_keep_their_order_values_and_nulls(tmp_path: Path, name: str) -> None:
    write_criteo(tmp_path / "src" / name, range(25), last="")
    progress: list[tuple[int, int]] = []
    summary = import_criteo(
        tmp_path / "src",
        tmp_path / "out",
        days=4,
        progress=lambda done, total: progress.append((done, total)),
    )
    events = read_events(tmp_path / "out").sort_values("request_id")
    assert events.request_id.tolist() == list(range(25))
    assert events.groupby("dt").size().tolist() == [6, 6, 6, 7]
    assert events.click.tolist() == [row % 2 for row in range(25)]
    assert events.timestamp.is_monotonic_increasing
    assert (events.timestamp.dt.strftime("%Y-%m-%d") == events.dt).all()
    for row in (0, 7, 24):
        for i, column in enumerate(INTEGERS):
            value = events[column].iloc[row]
            assert np.isnan(value) if (row + i) % 3 == 0 else value == row * i - 2
        for i, column in enumerate(CATEGORIES):
            value = events[column].iloc[row]
            assert np.isnan(value) if (row + i) % 4 == 0 else value == row * 1000003 + i
    schema = pq.read_schema(next((tmp_path / "out/events/dt=2014-01-01").glob("*.parquet")))
    assert (schema.field("C1").type, schema.field("I1").type) == (pa.int64(), pa.int32())
    assert pq.read_table(tmp_path / "out/items.parquet").to_pylist() == [{"item_id": 0}]
    assert (summary.events, summary.days, summary.label_rates) == (25, 4, {"click": 12 / 25})
    assert progress[-1][0] == progress[-1][1]


def test_criteo_reads_its_days_in_order_of_their_number(tmp_path: Path) -> None:
    write_criteo(tmp_path / "src" / "day_10.gz", range(5, 9))
    write_criteo(tmp_path / "src" / "day_2.gz", range(5))
    import_criteo(tmp_path / "src", tmp_path / "out", days=3)
    events = read_events(tmp_path / "out").sort_values("request_id")
    assert events.click.tolist() == [row % 2 for row in range(9)]
    assert events.C2.iloc[[0, 5]].tolist() == [1, 5 * 1000003 + 1]


def test_criteo_streams_many_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.adapters.importing.BLOCK_BYTES", 1_000)
    write_criteo(tmp_path / "src" / "train.txt", range(100))
    import_criteo(tmp_path / "src", tmp_path / "out", days=3)
    events = read_events(tmp_path / "out").sort_values("request_id")
    assert events.click.tolist() == [row % 2 for row in range(100)]
    assert events.groupby("dt").size().tolist() == [33, 33, 34]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("\n1\t", "\n2\t", r"train\.txt, line 2: the label is 2"),
        ("\n1\t", "\n", r"train\.txt.*Expected 40 columns, got 39"),
        ("000f4243", "000f424x", r"column C1: '000f424x' is not 8 hexadecimal digits"),
        ("\n1\t-2\t", "\n1\tmany\t", r"train\.txt.*'many'"),
    ],
)
def test_criteo_lines_that_do_not_fit_are_named(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    write_criteo(tmp_path / "src" / "train.txt", range(4))
    path = tmp_path / "src" / "train.txt"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        import_criteo(tmp_path / "src", tmp_path / "out", days=2)
    assert not (tmp_path / "out").exists()


def test_criteo_refuses_a_truncated_archive_and_an_empty_folder(tmp_path: Path) -> None:
    write_criteo(tmp_path / "src" / "train.txt.gz", range(500))
    path = tmp_path / "src" / "train.txt.gz"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"train\.txt\.gz cannot be unpacked"):
        import_criteo(tmp_path / "src", tmp_path / "out")
    path.unlink()
    with pytest.raises(UserError, match="holds no Criteo log"):
        import_criteo(tmp_path / "src", tmp_path / "out")


# --- avazu ---------------------------------------------------------------------------------------

AVAZU = (
    "id,click,hour,C1,banner_pos,site_id,site_domain,site_category,app_id,app_domain,app_category,"
    "device_id,device_ip,device_model,device_type,device_conn_type,C14,C15,C16,C17,C18,C19,C20,C21"
)
AVAZU_ROWS = [
    "10000094181510942730,0,14102100,1005,0,1fbe01fe,f3845767,28905ebd,ecad2386,7801e8d9,07d7df22,"
    "a99f214a,ddd2926e,44956a24,1,2,15706,320,50,1722,0,35,-1,79",
    "13554,1,14102123,1005,0,1fbe01fe,f3845767,28905ebd,ecad2386,7801e8d9,07d7df22,"
    "c357dbff,ddd2926e,44956a24,1,0,15704,320,50,1722,0,35,100084,79",
    "2,0,14102205,1005,1,1fbe01fe,f3845767,28905ebd,ecad2386,7801e8d9,07d7df22,"
    "a99f214a,96809ac8,711ee120,1,0,15704,320,50,1722,0,35,100084,79",
    "3,1,14102107,1005,1,1fbe01fe,f3845767,28905ebd,ecad2386,7801e8d9,07d7df22,"
    "a99f214a,96809ac8,711ee120,1,0,99,320,50,1722,0,35,100084,79",
]


def write_avazu(path: Path, rows: list[str], header: str = AVAZU) -> None:
    path.parent.mkdir(exist_ok=True)
    data = "\n".join([header, *rows]).encode() + b"\n"
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.mark.parametrize("name", ["train.csv", "train.gz"])
def test_avazu_rows_go_to_the_day_of_their_hour(tmp_path: Path, name: str) -> None:
    write_avazu(tmp_path / "src" / name, AVAZU_ROWS)
    summary = import_avazu(tmp_path / "src", tmp_path / "out")
    events = read_events(tmp_path / "out").sort_values("request_id")
    assert events.dt.tolist() == ["2014-10-21", "2014-10-21", "2014-10-22", "2014-10-21"]
    assert events.timestamp.tolist() == [
        pd.Timestamp(text, tz="UTC")
        for text in ("2014-10-21", "2014-10-21T23", "2014-10-22T05", "2014-10-21T07")
    ]
    assert events.hour.tolist() == [0, 23, 5, 7]
    assert events.weekday.tolist() == [1, 1, 2, 1]
    assert events.user_id.tolist() == [
        "ddd2926e-44956a24",
        "c357dbff",
        "96809ac8-711ee120",
        "96809ac8-711ee120",
    ]
    assert events.click.tolist() == [0, 1, 0, 1]
    assert events.C20.tolist() == [-1, 100084, 100084, 100084]
    items = pq.read_table(tmp_path / "out/items.parquet")
    assert items["item_id"].to_pylist() == [99, 15704, 15706]
    assert (summary.events, summary.items, summary.last_day) == (4, 3, "2014-10-22")


def test_avazu_recipe_reads_the_imported_log(tmp_path: Path) -> None:
    write_avazu(tmp_path / "src" / "train.csv", AVAZU_ROWS)
    import_avazu(tmp_path / "src", tmp_path / "out")
    recipe = load_recipe("avazu", [f"data.root={tmp_path / 'out'}"])

    checked = check_span(recipe, ["2014-10-21", "2014-10-22"], None)

    assert checked.num_rows == 4
    read = {feature.column_name for feature in recipe.features.sparse}
    assert read == {*AVAZU.split(","), "weekday"} - {"id", "click"}, "all columns of the log"


def test_avazu_faults_are_named(tmp_path: Path) -> None:
    path = tmp_path / "src" / "train.csv"
    for change, message in (
        (lambda row: row.replace("14102100", "14132100"), r"line 2: column 'hour' is 14132100"),
        (lambda row: row.replace("14102100", "14102124"), r"line 2: column 'hour' is 14102124"),
        (lambda row: row.replace("0,0,14102100", "0,3,14102100"), "'click' must be 0 or 1"),
        (lambda row: row.replace("15706", ""), r"line 2: column 'C14' is empty"),
    ):
        write_avazu(path, [change(AVAZU_ROWS[0]), *AVAZU_ROWS[1:]])
        with pytest.raises(UserError, match=message):
            import_avazu(tmp_path / "src", tmp_path / "out")
    write_avazu(path, AVAZU_ROWS, AVAZU.replace("click", "label"))
    with pytest.raises(UserError, match=r"lacks the columns \['click'\]"):
        import_avazu(tmp_path / "src", tmp_path / "out")
    write_avazu(path, [])
    with pytest.raises(UserError, match="no row"):
        import_avazu(tmp_path / "src", tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["src"]


# --- frappe --------------------------------------------------------------------------------------


def frappe_table(num_rows: int, first: int = 0) -> pd.DataFrame:
    rows = np.arange(first, first + num_rows)
    context = {name: [f"{name}{row % 3}" for row in rows] for name in CONTEXT}
    return pd.DataFrame({"user": rows % 7, "item": rows % 11, **context, "label": rows % 3 // 2})


META = (
    "item\tpackage\tcategory\tdownloads\tdeveloper\ticon\tlanguage\tdescription\tname\tprice"
    "\trating\tshort desc\n"
    '0\tcom.a\tTools\t1+\tA\t-\ten\tSays "hi\tClock\tFree\t4.5\t-\n'
    "12\tcom.b\tunknown\tunknown\tB\t-\tunknown\tunknown\tunknown\tunknown\tunknown\t-\n"
)


@pytest.mark.parametrize("kind", ["parquet", "splits"])
def test_frappe_is_split_into_three_pseudo_days(tmp_path: Path, kind: str) -> None:
    src = tmp_path / "src"
    src.mkdir()
    table = frappe_table(1000)
    if kind == "parquet":
        app = dict.fromkeys(("category", "downloads", "developer", "language", "price"), "x")
        table.assign(**app, rating="4.1").to_parquet(src / "frappe_ctr.parquet")
    else:
        for name, part in (
            ("train", table[:700]),
            ("valid", table[700:900]),
            ("test", table[900:]),
        ):
            part.to_csv(src / f"{name}.csv", index=False)
    (src / "meta.csv").write_text(META)
    summary = import_frappe(src, tmp_path / "out")
    events = read_events(tmp_path / "out")
    assert events.groupby("dt").size().to_dict() == {
        "2015-01-01": 700,
        "2015-01-02": 200,
        "2015-01-03": 100,
    }
    events = events.sort_values("request_id").reset_index(drop=True)
    assert events.user_id.tolist() == table.user.tolist()
    assert events.use.tolist() == table.label.tolist()
    assert events.city.tolist() == table.city.tolist()
    assert not (events.dt[:700] == "2015-01-01").all() if kind == "parquet" else True
    assert (events.timestamp.dt.strftime("%Y-%m-%d") == events.dt).all()
    items = {
        row["item_id"]: row for row in pq.read_table(tmp_path / "out/items.parquet").to_pylist()
    }
    assert set(items) == {*range(11), 12}
    assert items[0]["text"] == 'Clock. Says "hi'
    assert items[0]["category"] == ("x" if kind == "parquet" else "Tools")
    assert items[12]["developer"] == "B"
    assert items[12]["text"] is None
    assert items[1]["text"] is None
    assert summary.label_rates["use"] == pytest.approx(table.label.mean())


def test_frappe_split_depends_on_the_seed_alone(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    frappe_table(300).to_parquet(tmp_path / "src" / "frappe_ctr.parquet")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        import_frappe(tmp_path / "src", tmp_path / name, seed=seed)
    a, b, c = (read_events(tmp_path / name) for name in "abc")
    pd.testing.assert_frame_equal(a, b)
    assert a.request_id.tolist() != c.request_id.tolist()
    assert sorted(a.request_id) == sorted(c.request_id) == list(range(300))


def test_frappe_uses_get_two_unused_apps_in_the_same_context(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    table = frappe_table(40).drop(columns="label").assign(cnt=1)
    table = table[table.item < 6]
    table.to_csv(tmp_path / "src" / "frappe.csv", sep="\t", index=False)
    import_frappe(tmp_path / "src", tmp_path / "out")
    events = read_events(tmp_path / "out")
    used = set(zip(table.user, table.item, strict=True))
    pairs = list(zip(events.user_id, events.item_id, strict=True))
    assert [pair in used for pair in pairs] == (events.use == 1).tolist()
    assert (events.use == 1).sum() == len(table)
    choices = {user: 6 - table[table.user == user].item.nunique() for user in table.user}
    assert (events.use == 0).sum() == sum(min(2, choices[user]) for user in table.user)


def test_frappe_faults_are_named(tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    with pytest.raises(UserError, match=r"holds no Frappe.*libfm"):
        import_frappe(src, tmp_path / "out")
    table = frappe_table(10)
    for wrong, message in (
        (table.drop(columns="weather"), r"\['weather'\] are not among"),
        (table.drop(columns="label"), r"\['label'\] are not among"),
        (table.assign(label=[0, 1, 0, 5, *[0] * 6]), "row 3: label 5 must be 0 or 1"),
        (table.assign(item="x"), "user, item and label must be integers"),
        (table.assign(user=[1.0, None, *[2.0] * 8]), "row 1: column 'user' is empty"),
        (table[:0], "no row"),
    ):
        wrong.to_parquet(src / "frappe_ctr.parquet")
        with pytest.raises(UserError, match=message):
            import_frappe(src, tmp_path / "out")
    assert not (tmp_path / "out").exists()


REAL = Path(__file__).parents[2].parent / "shared" / "data" / "frappe"


@pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is not there")
def test_frappe_is_whole(tmp_path: Path) -> None:
    summary = import_frappe(REAL, tmp_path / "out")
    assert (summary.events, summary.items) == (288_609, 4_082)
    assert summary.label_rates["use"] == pytest.approx(96_203 / 288_609)
    assert summary.notes["items with a text"] == pytest.approx(0.865 * 4_082, abs=3)
