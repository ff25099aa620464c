import io
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.dataset as pa_dataset
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score

from embedding.errors import UserError
from pipeline.config import SyntheticConfig
from pipeline.marketplace.counter_random import CounterRandom
from pipeline.marketplace.market import Marketplace
from pipeline.marketplace.synthetic import generate, synthetic_config

SMALL = SyntheticConfig(num_days=3, events_per_day=1_003, num_users=150, num_items=100)
DEMO = SyntheticConfig(num_days=8)


def read_events(root: Path) -> pd.DataFrame:
    events = pa_dataset.dataset(root / "events", partitioning="hive").to_table().to_pandas()
    return events.assign(dt=events.dt.astype(str))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("market") / "demo"
    generate(DEMO, root)
    return root


@pytest.fixture(scope="module")
def events(demo: Path) -> pd.DataFrame:
    return read_events(demo)


@pytest.fixture(scope="module")
def items(demo: Path) -> pd.DataFrame:
    return pq.read_table(demo / "items.parquet").to_pandas()


def content_of(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


# --- files ---------------------------------------------------------------------------------------


def test_equal_configs_give_equal_bytes_and_another_seed_other_events(tmp_path: Path) -> None:
    generate(SMALL, tmp_path / "a")
    generate(SMALL, tmp_path / "b")
    generate(SMALL.model_copy(update={"seed": 1}), tmp_path / "c")
    a, b, c = (content_of(tmp_path / name) for name in "abc")
    assert a == b
    assert len(a) == SMALL.num_days + 3
    assert all(a[name] != c[name] for name in a)


def test_chunk_size_does_not_change_the_catalogue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate(SMALL, tmp_path / "whole")
    monkeypatch.setattr("pipeline.marketplace.synthetic.CHUNK_ITEMS", 7)
    monkeypatch.setattr("pipeline.marketplace.synthetic.CHUNK_USERS", 11)
    generate(SMALL, tmp_path / "chunks")
    for name in ("items.parquet", "users.parquet"):
        assert pq.read_table(tmp_path / "whole" / name).equals(
            pq.read_table(tmp_path / "chunks" / name)
        )


def test_every_day_has_its_events_in_many_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.marketplace.synthetic.CHUNK_EVENTS", 70)
    monkeypatch.setattr("pipeline.samples.dataset.ROW_GROUP_ROWS", 100)
    progress: list[tuple[int, int]] = []
    generate(SMALL, tmp_path / "x", progress=lambda done, total: progress.append((done, total)))
    events = read_events(tmp_path / "x")
    assert events.groupby("dt").size().to_dict() == {
        "2024-01-01": 1003,
        "2024-01-02": 1003,
        "2024-01-03": 1003,
    }
    path = next((tmp_path / "x/events/dt=2024-01-02").glob("*.parquet"))
    assert pq.ParquetFile(path).num_row_groups > 5
    done, total = progress[-1]
    assert done == total
    assert [d for d, _ in progress] == sorted(d for d, _ in progress)


def test_a_second_generation_leaves_the_files_alone(tmp_path: Path) -> None:
    generate(SMALL, tmp_path / "x")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "x").rglob("*")}
    generate(SMALL, tmp_path / "x")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "x").rglob("*")}


def test_another_marketplace_or_foreign_files_are_refused(tmp_path: Path) -> None:
    generate(SMALL, tmp_path / "x")
    with pytest.raises(UserError, match=r"num_users is 150, asked for is 151.*delete"):
        generate(SMALL.model_copy(update={"num_users": 151}), tmp_path / "x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not written by this command"):
        generate(SMALL, tmp_path / "mine")


def test_an_interrupted_generation_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: int, _total: int) -> None:
        if done > 500:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(SMALL, tmp_path / "x", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_two_first_runs_share_one_generation(tmp_path: Path) -> None:
    root = tmp_path / "x"
    code = (
        "import sys; from pathlib import Path; from pipeline.config import SyntheticConfig\n"
        "from pipeline.marketplace.synthetic import generate\n"
        f"config = SyntheticConfig.model_validate_json({SMALL.model_dump_json()!r})\n"
        "def pause(done, total):\n"
        "    if done == total: print('written', flush=True); sys.stdin.readline()\n"
        f"generate(config, Path({str(root)!r}), progress=pause)"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdin is not None
    assert first.stdout is not None
    try:
        assert first.stdout.readline() == "written\n"
        second = threading.Thread(target=generate, args=(SMALL, root))
        second.start()
        second.join(0.5)
        assert second.is_alive(), "it waits"
        assert len(list((tmp_path / ".x.partial" / "events").iterdir())) == SMALL.num_days
        first.stdin.write("\n")
        first.stdin.flush()
        assert first.wait(30) == 0
        second.join(30)
        assert not second.is_alive()
    finally:
        first.kill()
        first.wait()
    assert len(read_events(root)) == 3 * SMALL.events_per_day
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize(
    ("values", "overrides", "message"),
    [
        ({"num_items": 5}, [], "candidates_per_request"),
        ({}, ["drifft=1"], r"drifft.*keys: num_days"),
        ({}, ["base_rate=2"], "base_rate"),
        ({}, ["first_day=31.12.2023"], "first_day.*valid date"),
    ],
)
def test_wrong_sizes_are_named(values: dict[str, int], overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        synthetic_config(values, overrides)


# --- requests ------------------------------------------------------------------------------------


def test_a_request_has_one_user_one_time_and_distinct_items(events: pd.DataFrame) -> None:
    requests = events.groupby("request_id")
    assert (requests.size() == DEMO.candidates_per_request).all()
    for column in ("user_id", "timestamp", "device", "hour", "dt"):
        assert (requests[column].nunique() == 1).all(), column
    assert (requests.item_id.nunique() == DEMO.candidates_per_request).all()
    assert (requests.position.nunique() == DEMO.candidates_per_request).all()


def test_requests_of_a_user_have_distinct_times_inside_of_their_day(events: pd.DataFrame) -> None:
    requests = events.drop_duplicates("request_id")
    assert not requests.duplicated(["user_id", "timestamp"]).any()
    assert (events.timestamp.dt.strftime("%Y-%m-%d") == events.dt).all()
    assert (events.timestamp.dt.hour == events.hour).all()


def test_few_items_and_many_candidates_still_give_distinct_ones(tmp_path: Path) -> None:
    config = SMALL.model_copy(update={"num_items": 11, "candidates_per_request": 10})
    generate(config, tmp_path / "x")
    assert not read_events(tmp_path / "x").duplicated(["request_id", "item_id"]).any()


def test_items_are_born_and_die_daily(events: pd.DataFrame, items: pd.DataFrame) -> None:
    births = round(DEMO.num_items * DEMO.births_per_day)
    days = sorted(events.dt.unique())
    assert len(items) == DEMO.num_items + births * (len(days) - 1)
    shown = [set(events[events.dt == day].item_id) for day in days]
    for day, ids in enumerate(shown):
        assert min(ids) >= day * births
        assert max(ids) < day * births + DEMO.num_items
        born = items[items.born_day == day].item_id
        if day:
            assert len(born) == births
            assert not set(born) & set().union(*shown[:day])
            assert len(set(born) & ids) > 0.8 * births
    assert (items.born_day.to_numpy()[np.array(sorted(shown[0]))] <= 0).all()


def test_some_users_join_later(events: pd.DataFrame) -> None:
    days = sorted(events.dt.unique())
    seen = set(events[events.dt < days[-1]].user_id)
    new = events[(events.dt == days[-1]) & ~events.user_id.isin(seen)]
    assert 0 < new.user_id.nunique() < 0.2 * DEMO.num_users
    joined = Marketplace(DEMO).joined(np.arange(DEMO.num_users))
    first = events.groupby("user_id").dt.min().map(days.index)
    assert (first.to_numpy() >= joined[first.index.to_numpy()]).all()


# --- truth ---------------------------------------------------------------------------------------


def test_clicks_follow_the_oracle_at_the_base_rate(events: pd.DataFrame) -> None:
    assert events.click.mean() == pytest.approx(DEMO.base_rate, abs=0.01)
    bins = pd.qcut(events.oracle_click, 10)
    table = events.groupby(bins, observed=True)[["click", "oracle_click"]].mean()
    # 16,000 rows a bin: the rate's standard error is at most 0.004.
    assert (table.click - table.oracle_click).abs().max() < 4 * 0.004


def test_oracle_auc_is_in_range_and_beats_every_observed_column(
    events: pd.DataFrame, items: pd.DataFrame, demo: Path
) -> None:
    oracle = roc_auc_score(events.click, events.oracle_click)
    assert 0.74 < oracle < 0.82
    users = pq.read_table(demo / "users.parquet").to_pandas()
    joined = events.merge(items.drop(columns=["image", "text"]), on="item_id")
    joined = joined.merge(users, on="user_id")
    train, test = joined[joined.dt < "2024-01-08"], joined[joined.dt == "2024-01-08"]
    best = roc_auc_score(test.click, test.oracle_click)
    for column in joined.columns.difference(["click", "oracle_click", "dt"]):
        rates = train.groupby(column).click.agg(["sum", "count"])
        smoothed = (rates["sum"] + 4) / (rates["count"] + 20)
        auc = roc_auc_score(test.click, test[column].map(smoothed).fillna(0.2))
        assert auc < best - 0.1, column


def test_text_ranks_new_items_and_ids_do_not(events: pd.DataFrame, items: pd.DataFrame) -> None:
    """Independent check by logistic regression, one per source, on items of the last day only."""
    is_train = events.dt < "2024-01-08"
    known = set(events[is_train].item_id)
    new = events[~is_train & ~events.item_id.isin(known)]
    assert len(new) > 500
    topics = words_to_topics(items)
    tastes = topic_tastes(events[is_train & (events.dt < "2024-01-05")], topics)
    fit = events[is_train & (events.dt >= "2024-01-05")]
    model = LogisticRegression(max_iter=500, C=0.1).fit(
        content_columns(fit, topics, tastes), fit.click
    )
    by_content = roc_auc_score(
        new.click, model.predict_proba(content_columns(new, topics, tastes))[:, 1]
    )
    item_rate = events[is_train].groupby("item_id").click.mean()
    by_id = roc_auc_score(new.click, new.item_id.map(item_rate).fillna(DEMO.base_rate))
    assert by_id == 0.5
    assert by_content > 0.57
    assert roc_auc_score(new.click, new.oracle_click) > by_content + 0.05


def words_to_topics(items: pd.DataFrame) -> np.ndarray:
    """Principal components of the word counts: what a reader of the texts alone can know."""
    counts = CountVectorizer().fit_transform(items.text).toarray().astype(float)
    centred = np.log1p(counts) - np.log1p(counts).mean(axis=0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    topics = left[:, :8] * values[:8]
    return topics / topics.std(axis=0)


def topic_tastes(events: pd.DataFrame, topics: np.ndarray) -> np.ndarray:
    """Mean topic of a user's clicks minus that of what was shown, shrunk."""
    tastes = np.zeros((DEMO.num_users, topics.shape[1]))
    weight = events.click.to_numpy() - DEMO.base_rate
    np.add.at(tastes, events.user_id.to_numpy(), weight[:, None] * topics[events.item_id])
    return tastes / 10


def content_columns(events: pd.DataFrame, topics: np.ndarray, tastes: np.ndarray) -> np.ndarray:
    item, user = topics[events.item_id], tastes[events.user_id]
    return np.hstack([item, item * user, (item * user).sum(axis=1, keepdims=True)])


def test_pictures_show_the_latent(items: pd.DataFrame) -> None:
    pixels = np.stack(
        [np.asarray(Image.open(io.BytesIO(data)), dtype=float).ravel() for data in items.image]
    )
    assert pixels.shape == (len(items), 32 * 32 * 3)
    latents = Marketplace(DEMO).latents(items.item_id.to_numpy())
    model = Ridge(alpha=1e6).fit(pixels[::2], latents[::2])
    predicted = model.predict(pixels[1::2])
    shown = [np.corrcoef(predicted[:, d], latents[1::2, d])[0, 1] for d in range(5)]
    assert min(shown) > 0.5  # the colours
    assert max(shown) < 0.99  # a noisy view


@pytest.mark.parametrize(("taste_dim", "image_size"), [(2, 8), (12, 20), (40, 64)])
def test_any_number_of_tastes_and_picture_size_works(
    tmp_path: Path, taste_dim: int, image_size: int
) -> None:
    config = SMALL.model_copy(update={"taste_dim": taste_dim, "image_size": image_size})
    generate(config, tmp_path / "x")
    items = pq.read_table(tmp_path / "x" / "items.parquet").to_pandas()
    pictures = [Image.open(io.BytesIO(data)) for data in items.image]
    assert {picture.size for picture in pictures} == {(image_size, image_size)}
    assert len(set(items.image)) > 0.9 * len(items)
    events = read_events(tmp_path / "x")
    assert 0.65 < roc_auc_score(events.click, events.oracle_click) < 0.9


def test_side_information_is_noisy(items: pd.DataFrame) -> None:
    latents = Marketplace(DEMO).latents(items.item_id.to_numpy())
    truth = np.hstack([latents, -latents]).argmax(axis=1)
    majority = pd.crosstab(items.category, truth).max(axis=1).sum() / len(items)
    assert 0.3 < majority < 0.9
    assert items.category.nunique() == 2 * DEMO.taste_dim
    assert (items.price > 0).all()


def test_content_share_moves_appeal_between_content_and_item() -> None:
    ids = np.arange(4000)
    for share in (0.0, 0.3, 1.0):
        market = Marketplace(DEMO.model_copy(update={"content_share": share}))
        own = market.own_appeal(ids, 0)
        tastes = market.tastes(ids, 0)
        logits = market.item_logits(tastes, market.latents(ids)[:, None, :], own[:, None], 0)[:, 0]
        explained = np.corrcoef(logits, own)[0, 1] ** 2
        assert explained == pytest.approx(1 - share, abs=0.05)


def test_drift_changes_tastes_by_its_size_and_keeps_their_spread() -> None:
    ids = np.arange(20_000)
    for drift in (0.0, 0.1, 0.3):
        market = Marketplace(DEMO.model_copy(update={"drift": drift}))
        step = market.own_appeal(ids, 6) - market.own_appeal(ids, 5)
        assert step.std() == pytest.approx(2 * np.sin(drift / 2), rel=0.03, abs=1e-9)
        assert market.own_appeal(ids, 6).std() == pytest.approx(1, abs=0.02)
        assert market.tastes(ids, 6).std() == pytest.approx(1, abs=0.05)


def test_counter_random_is_uniform_normal_and_independent() -> None:
    random, ids = CounterRandom(3), np.arange(50_000)
    uniform = random.uniform("u", ids, 3)
    normal = random.normal("n", ids, 3)
    assert np.histogram(uniform, 20, (0, 1))[0] == pytest.approx(7_500, rel=0.06)
    assert normal.mean(axis=0) == pytest.approx(0, abs=0.02)
    assert (normal**4).mean(axis=0) == pytest.approx(3, rel=0.05)
    together = np.hstack([uniform, normal, random.uniform("v", ids), uniform[:, :1] ** 2])
    correlation = np.corrcoef(together[:, :7], rowvar=False) - np.eye(7)
    assert np.abs(correlation).max() < 0.02
    lagged = np.corrcoef(uniform[:-1, 0], uniform[1:, 0])[0, 1]
    assert abs(lagged) < 0.02
    np.testing.assert_array_equal(random.uniform("u", ids[777:], 3), uniform[777:])
