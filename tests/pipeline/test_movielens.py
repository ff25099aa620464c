import os
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.dataset as pa_dataset
import pyarrow.parquet as pq
import pytest

from embedding.errors import UserError
from pipeline.adapters.movielens import import_movielens
from pipeline.samples.dataset import TIMESTAMP

DAY = 86_400
T0 = 874_713_600  # 1997-09-20 00:00 UTC
RATINGS = [  # user, item, rating, timestamp
    (1, 10, 5, T0 + 100),
    (1, 20, 3, T0 + 50),
    (2, 30, 4, T0 + 70),
    (2, 10, 1, T0 + DAY),
    (3, 40, 4, T0 + DAY + 5),
    (1, 50, 2, T0 + 3 * DAY),
]
FLAGS = ["genre_unknown", "Action", "Adventure", "Animation", "Children", "Comedy", "Crime"]
FLAGS += ["Documentary", "Drama", "Fantasy", "FilmNoir", "Horror", "Musical", "Mystery"]
FLAGS += ["Romance", "SciFi", "Thriller", "War", "Western"]


def write_100k(src: Path) -> None:
    src.mkdir()
    lines = ["\t".join(map(str, row)) for row in RATINGS]
    (src / "u.data").write_text("\n".join(lines) + "\n")
    flags = {10: "0000100000000001000", 20: "1" + "0" * 18}
    titles = {10: "Cité des Enfants, La (1995)", 20: "unknown"}
    movies = [
        f"{key}|{titles[key]}|01-Jan-1995||http://x?{key}|" + "|".join(flags[key]) for key in titles
    ]
    (src / "u.item").write_bytes(("\n".join(movies) + "\n").encode("latin-1"))
    (src / "u.user").write_text("1|24|M|technician|85711\n2|53|F|other|94043\n")


def write_1m(src: Path) -> None:
    src.mkdir()
    lines = ["::".join(map(str, row)) for row in RATINGS]
    (src / "ratings.dat").write_text("\n".join(lines) + "\n")
    movies = '10::Cité: des "Enfants", La (1995)::Children\'s|Sci-Fi\n20::unknown::\n'
    (src / "movies.dat").write_bytes(movies.encode("latin-1"))
    (src / "users.dat").write_text("1::M::18::17::85711\n2::F::50::0::94043-1234\n")


def write_10m(src: Path) -> None:
    src.mkdir()
    lines = [f"{u}::{i}::{r - 0.5}::{t}" for u, i, r, t in RATINGS]
    (src / "ratings.dat").write_text("\n".join(lines) + "\n")
    (src / "movies.dat").write_text("10::Cité (1995)::Children|Sci-Fi\n", encoding="utf-8")
    tags = [(1, 10, "Dream"), (2, 10, "dream "), (2, 10, "a::b"), (3, 30, "slow")]
    lines = ["::".join(map(str, (*tag, T0))) for tag in tags]
    (src / "tags.dat").write_text("\n".join(lines))


def write_25m(src: Path) -> None:
    folder = src / "ml-25m"
    folder.mkdir(parents=True)
    lines = [f"{u},{i},{r - 0.5},{t}" for u, i, r, t in RATINGS]
    (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + "\n".join(lines))
    movies = (
        'movieId,title,genres\n10,"Cité, La (1995)",Children|Sci-Fi\n20,None,(no genres listed)\n'
    )
    (folder / "movies.csv").write_text(movies, encoding="utf-8")
    tags = 'userId,movieId,tag,timestamp\n1,10,"Dream, big",5\n2,10,"dream, BIG",6\n2,10,slow,7\n'
    (folder / "tags.csv").write_text(tags)


def write_plots(src: Path) -> None:
    (src / "posters").mkdir(parents=True)
    lines = [",".join(map(str, row)) for row in RATINGS]
    header = "user_id,movie_id,rating,unix_timestamp\n"
    (src / "ratings.csv").write_text(header + "\n".join(lines) + "\n")
    flags = ",".join("1" if name in ("Children", "SciFi") else "0" for name in FLAGS)
    items = f"movie_id,title,{','.join(FLAGS)},year,overview,original_language,runtime,poster\n"
    items += f'10,Cité (1995),{flags},1995.0,"Two\nlines, of ""plot"".",fr,112.0,posters/10.jpg\n'
    items += f"20,unknown,1{',0' * 18},,,,,\n"
    (src / "items.csv").write_text(items, encoding="utf-8")
    (src / "posters" / "10.jpg").write_bytes(b"\xff\xd8poster")
    users = "user_id,age,sex,occupation,zip_code\n1,24,M,technician,85711\n2,53,F,other,94043\n"
    (src / "users.csv").write_text(users)


LAYOUTS = {
    "100k": write_100k,
    "1m": write_1m,
    "10m": write_10m,
    "25m": write_25m,
    "plots": write_plots,
}


def read_events(root: Path) -> pd.DataFrame:
    events = pa_dataset.dataset(root / "events", partitioning="hive").to_table().to_pandas()
    return events.assign(dt=events.dt.astype(str))


def read_rows(path: Path, key: str) -> dict[int, dict[str, object]]:
    return {row[key]: row for row in pq.read_table(path).to_pylist()}


# --- layouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_contract(tmp_path: Path, layout: str) -> None:
    LAYOUTS[layout](tmp_path / "src")
    summary = import_movielens(tmp_path / "src", tmp_path / "out", negatives=1)
    half = 0.5 if layout in ("10m", "25m") else 0.0

    path = next((tmp_path / "out/events/dt=1997-09-20").glob("*.parquet"))
    schema = pq.read_schema(path)
    assert schema.field("timestamp").type == TIMESTAMP
    assert [schema.field(name).type for name in ("like", "watch")] == [pa.int8()] * 2
    events = read_events(tmp_path / "out")
    rated = events[events.watch == 1].sort_values(["user_id", "timestamp"])
    found = list(zip(rated.user_id, rated.item_id, rated.rating, rated.timestamp, strict=True))
    assert found == [
        (user, item, rating - half, pd.Timestamp(seconds, unit="s", tz="UTC"))
        for user, item, rating, seconds in sorted(RATINGS, key=lambda row: (row[0], row[3]))
    ]
    assert (rated.rating_level == 2 * rated.rating).all()
    assert (rated.like == (rated.rating >= 4)).all()
    assert (events.dt == events.timestamp.dt.strftime("%Y-%m-%d")).all()
    assert sorted(events.dt.unique()) == ["1997-09-20", "1997-09-21", "1997-09-23"]
    assert (summary.events, summary.days) == (len(events), 3)

    items = read_rows(tmp_path / "out/items.parquet", "item_id")
    assert set(items) == {10, 20, 30, 40, 50}
    assert items[10]["genres"] == ["Children", "Sci-Fi"]
    assert items[10]["genre_set"] == "Children|Sci-Fi"
    assert (items[10]["year"], items[10]["decade"]) == (1995, 1990)
    assert str(items[10]["title"]).startswith("Cité")
    assert items[50]["title"] is None
    assert items[20]["genres"] == []
    assert items[20]["primary_genre"] is None
    users = read_rows(tmp_path / "out/users.parquet", "user_id")
    assert set(users) == {1, 2, 3}
    assert set(users[3].values()) == {3, None}


@pytest.mark.parametrize("layout", ["100k", "1m", "plots"])
def test_users_are_described_where_the_layout_has_them(tmp_path: Path, layout: str) -> None:
    LAYOUTS[layout](tmp_path / "src")
    import_movielens(tmp_path / "src", tmp_path / "out")
    users = read_rows(tmp_path / "out/users.parquet", "user_id")
    age = {"1m": (18, 50)}.get(layout, (24, 53))
    assert users[1] == {
        "user_id": 1,
        "age": age[0],
        "age_group": "18-24",
        "sex": "M",
        "occupation": "technician",
        "zip_prefix": "85",
    }
    assert (users[2]["age"], users[2]["age_group"]) == (age[1], "50-55")
    assert (users[2]["occupation"], users[2]["zip_prefix"]) == ("other", "94")


def test_text_joins_title_plot_and_tags_and_posters_are_bytes(tmp_path: Path) -> None:
    write_plots(tmp_path / "src")
    (tmp_path / "src" / "tags.csv").write_text(
        "userId,movieId,tag,timestamp\n1,10,Slow,1\n2,10,dream,2\n3,10,Dream,2\n"
    )
    import_movielens(tmp_path / "src", tmp_path / "out", tags=True)
    items = read_rows(tmp_path / "out/items.parquet", "item_id")
    assert items[10]["text"] == 'Cité (1995) Two\nlines, of "plot". Tags: dream, slow.'
    assert items[10]["image"] == b"\xff\xd8poster"
    assert items[20]["text"] == "unknown"
    assert items[20]["image"] is None
    assert items[30]["text"] is None


def test_tags_are_counted_without_case(tmp_path: Path) -> None:
    for layout, tags in (("10m", "dream, a::b"), ("25m", "dream, big, slow")):
        LAYOUTS[layout](tmp_path / layout)
        import_movielens(tmp_path / layout, tmp_path / f"{layout}.out", tags=True)
        items = read_rows(tmp_path / f"{layout}.out/items.parquet", "item_id")
        assert str(items[10]["text"]).endswith(f"Tags: {tags}.")


def test_tags_stay_out_unless_asked_for(tmp_path: Path) -> None:
    """They may be younger than the ratings that a model is evaluated on."""
    LAYOUTS["25m"](tmp_path / "src")
    import_movielens(tmp_path / "src", tmp_path / "out")
    items = read_rows(tmp_path / "out/items.parquet", "item_id")
    assert not [item["text"] for item in items.values() if "dream" in str(item["text"])]


def test_posters_in_a_folder_are_found_in_every_layout(tmp_path: Path) -> None:
    write_100k(tmp_path / "src")
    (tmp_path / "src" / "posters").mkdir()
    (tmp_path / "src" / "posters" / "20.png").write_bytes(b"png")
    import_movielens(tmp_path / "src", tmp_path / "out")
    items = read_rows(tmp_path / "out/items.parquet", "item_id")
    assert [items[key]["image"] for key in (10, 20)] == [None, b"png"]


def test_items_and_users_in_csv_are_read_beside_the_ratings_of_any_layout(tmp_path: Path) -> None:
    """Who adds plots to a download of GroupLens puts them beside its ratings."""
    write_plots(tmp_path / "plots")
    for layout in ("100k", "1m"):
        src = tmp_path / layout
        LAYOUTS[layout](src)
        for name in ("items.csv", "users.csv", "posters"):
            (tmp_path / "plots" / name).rename(src / name)
        summary = import_movielens(src, tmp_path / f"{layout}.out")
        items = read_rows(tmp_path / f"{layout}.out/items.parquet", "item_id")
        assert items[10]["text"] == 'Cité (1995) Two\nlines, of "plot".'
        assert items[10]["image"] == b"\xff\xd8poster"
        assert summary.notes["items with a plot text"] == 1
        users = read_rows(tmp_path / f"{layout}.out/users.parquet", "user_id")
        assert users[2]["age"] == 53
        for name in ("items.csv", "users.csv", "posters"):
            (src / name).rename(tmp_path / "plots" / name)


def test_what_is_missing_is_counted_too(tmp_path: Path) -> None:
    write_100k(tmp_path / "src")
    notes = import_movielens(tmp_path / "src", tmp_path / "out").notes
    assert notes["items with genres"] == 1
    assert (notes["items with a plot text"], notes["items with a poster"]) == (0, 0)


# --- sampled rows --------------------------------------------------------------------------------


def write_random_log(src: Path, num_ratings: int = 3_000) -> pd.DataFrame:
    import numpy as np

    rng = np.random.default_rng(5)
    log = pd.DataFrame(
        {
            "userId": rng.integers(1, 60, num_ratings),
            "movieId": (rng.random(num_ratings) ** 2 * 400).astype(int) + 1,
            "rating": rng.integers(1, 11, num_ratings) / 2,
            "timestamp": T0 + rng.integers(0, 20 * DAY, num_ratings),
        }
    ).drop_duplicates(["userId", "movieId"])
    src.mkdir()
    log.to_csv(src / "ratings.csv", index=False)
    return log


def test_sampled_rows_are_known_by_that_day_and_never_rated(tmp_path: Path) -> None:
    log = write_random_log(tmp_path / "src")
    import_movielens(tmp_path / "src", tmp_path / "out", negatives=3, seed=1)
    events = read_events(tmp_path / "out")
    sampled, rated = events[events.watch == 0], events[events.watch == 1]
    assert len(rated) == len(log)
    assert sampled[["rating", "rating_level", "like"]].isna().all(axis=None)

    pairs = set(zip(log.userId, log.movieId, strict=True))
    assert not pairs & set(zip(sampled.user_id, sampled.item_id, strict=True))
    first_day = rated.groupby("item_id").dt.min()
    assert (sampled.item_id.map(first_day) <= sampled.dt).all()

    both = sampled.merge(rated, on="request_id", suffixes=("", "_rated"))
    assert len(both) == len(sampled)
    assert (both.user_id == both.user_id_rated).all()
    assert (both.timestamp == both.timestamp_rated).all()
    assert not sampled.duplicated(["request_id", "item_id"]).any()
    # K rows a positive, or all there are where the known items are few.
    known = {day: set(first_day[first_day <= day].index) for day in events.dt.unique()}
    counts = sampled.groupby("request_id").size().reindex(rated.request_id, fill_value=0)
    seen = log.groupby("userId").movieId.agg(set)
    for user, day, count in zip(rated.user_id, rated.dt, counts, strict=True):
        assert count == min(3, len(known[day] - seen[user]))
    assert (counts == 3).mean() > 0.99


def test_sampling_is_reproducible_by_seed(tmp_path: Path) -> None:
    write_random_log(tmp_path / "src")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        import_movielens(tmp_path / "src", tmp_path / name, seed=seed)
    a, b, c = (read_events(tmp_path / name) for name in "abc")
    pd.testing.assert_frame_equal(a, b)
    assert (
        a[a.watch == 1]
        .drop(columns="request_id")
        .equals(c[c.watch == 1].drop(columns="request_id"))
    )
    assert not a.item_id.equals(c.item_id)


def test_few_known_items_give_fewer_sampled_rows_and_are_counted(tmp_path: Path) -> None:
    write_100k(tmp_path / "src")
    summary = import_movielens(tmp_path / "src", tmp_path / "out", negatives=4)
    events = read_events(tmp_path / "out")
    # Known on 09-20: 10, 20, 30; on 09-21: 40 too; on 09-23: 50 too. User 1 rated 10, 20, 50;
    # user 2 10, 30; user 3 40.
    counts = events[events.watch == 0].groupby("timestamp").size().tolist()
    assert counts == [1, 1, 1, 2, 3, 2]
    assert summary.notes["sampled rows"] == 10
    assert summary.notes["negatives missing (too few unrated items)"] == 4 * 6 - 10


# --- what goes wrong -----------------------------------------------------------------------------


def test_the_same_import_again_is_a_no_op_and_another_is_refused(tmp_path: Path) -> None:
    write_100k(tmp_path / "src")
    out = tmp_path / "out"
    first = import_movielens(tmp_path / "src", out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert import_movielens(tmp_path / "src", out) == first
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(UserError, match=r"negatives is 4, asked for is 2.*delete"):
        import_movielens(tmp_path / "src", out, negatives=2)
    os.utime(tmp_path / "src" / "u.data", (0, 0))
    with pytest.raises(UserError, match="source"):
        import_movielens(tmp_path / "src", out)


def spoil(path: str, old: str, new: str) -> Callable[[Path], None]:
    def change(src: Path) -> None:
        text = (src / path).read_text(encoding="latin-1")
        assert old in text
        (src / path).write_text(text.replace(old, new, 1), encoding="latin-1")

    return change


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("100k", spoil("u.data", "\t4\t", "\tgood\t"), r"u\.data.*[Rr]ow #3.*'good'"),
        ("100k", spoil("u.data", "\t4\t", "\t9\t"), r"u\.data, line 3: rating 9"),
        ("100k", spoil("u.data", "2\t30", "\t30"), r"u\.data, line 3: column 'user' is empty"),
        ("100k", spoil("u.item", "10|", "ten|"), r"u\.item, line 1: column 'movie id' is 'ten'"),
        ("100k", spoil("u.user", "|94043", ""), r"u\.user, line 2: .* needs 5"),
        ("1m", spoil("ratings.dat", "::4::", "::"), r"ratings\.dat.*Expected 7 columns"),
        ("1m", spoil("users.dat", "::17::", "::99::"), r"users\.dat, line 1: occupation 99"),
        ("plots", spoil("ratings.csv", "movie_id", "film"), r"\['movieId', 'movie_id'\]"),
        ("plots", spoil("ratings.csv", ",4,", ",4.3,"), r"ratings\.csv, line 4: rating 4\.3"),
        ("plots", spoil("items.csv", "title", "name"), r"items\.csv: its header .* title"),
        ("plots", spoil("items.csv", "s/10.jpg", "s/11.jpg"), r"poster posters/11\.jpg"),
        ("plots", spoil("users.csv", "sex", "gender"), r"lacks \['sex'\]"),
        ("plots", spoil("users.csv", ",85711", ""), r"users\.csv, line 2: .*column 'zip_code'"),
        ("plots", spoil("users.csv", "1,24,M,technician,85711", "1"), r"line 2: .*column 'age'"),
        ("plots", spoil("users.csv", "1,24,", "1,99999,"), r"users\.csv, line 2: .*16 bits"),
        ("plots", spoil("items.csv", "1995.0", "unknown"), r"items\.csv, line 3: .*'year' is 'unk"),
        ("plots", spoil("items.csv", "1995.0", "inf"), r"items\.csv, line 3: .*'year' is 'inf'"),
        (
            "plots",
            spoil("items.csv", "1995.0", "40000"),
            r"items\.csv, line 3: .*'year' is '40000'",
        ),
        ("1m", spoil("movies.dat", "10::", f"{10**19}::"), r"movies\.dat, line 1: .*'MovieID'"),
        ("100k", spoil("u.data", str(T0 + 70), f"{T0}000"), rf"line 3: .* timestamp {T0}000"),
    ],
)
def test_sources_that_do_not_fit_are_named(
    tmp_path: Path, layout: str, change: Callable[[Path], None], message: str
) -> None:
    LAYOUTS[layout](tmp_path / "src")
    change(tmp_path / "src")
    with pytest.raises(UserError, match=message):
        import_movielens(tmp_path / "src", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_a_folder_without_ratings_and_a_directory_in_use_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a directory"):
        import_movielens(tmp_path / "none", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no MovieLens"):
        import_movielens(tmp_path / "empty", tmp_path / "out")
    write_100k(tmp_path / "src")
    with pytest.raises(UserError, match="not written by this command"):
        import_movielens(tmp_path / "src", tmp_path / "src")


REAL = Path(__file__).parents[2].parent / "shared" / "data" / "ml100k"


@pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is not there")
def test_movielens_100k_is_whole(tmp_path: Path) -> None:
    summary = import_movielens(REAL, tmp_path / "out")
    assert (summary.events, summary.users, summary.items) == (500_000, 943, 1_682)
    assert (summary.first_day, summary.last_day) == ("1997-09-20", "1998-04-22")
    log = pd.read_csv(REAL / "ratings.csv")
    assert summary.label_rates == {"like": (log.rating >= 4).mean(), "watch": 0.2}
    assert summary.notes["items with a poster"] == 1_663
