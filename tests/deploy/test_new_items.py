"""Items that training did not know are scored by their text and image."""

import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel

from deploy import new_items
from deploy.app import main
from deploy.item_encoder import ItemEncoder
from deploy.predictor import Predictor
from deploy.serving import live_model
from deploy.serving.live_model import LiveModel, ModelSource
from deploy.serving.wire import ScoreRequest
from embedding.errors import UserError
from embedding.items import ItemRows
from multimodal.content_encoder import load_content_encoder, load_trained_state
from multimodal.item_inputs import build_preparer
from multimodal.token_batch import ModalityTokens, TokenBatch
from multimodal.tower_models import load_model
from multimodal.towers import load_tower
from tests.deploy.published import (
    EMPTY,
    ITEMS_PER_BATCH,
    PICTURE_LESS,
    TEXT_LESS,
    Row,
    catalogue_rows,
    item_row,
    picture,
    settings,
    write_catalogue,
)
from tests.deploy.refusal import refused
from tests.pipeline.content_steps import NUM_ITEMS

NEW, OTHER_NEW = 100, 101
ACCURACY = 1e-5
"""Of vectors: LoRA folded into a weight rounds otherwise than beside it."""


def stored_vectors(folder: Path) -> Tensor:
    """By item id: they are 0, 1, ... here."""
    stored = load_file(folder / "bundle" / "content.safetensors")
    return stored["vectors"][stored["item_ids"].argsort()]


def encode(folder: Path, rows: list[Row]) -> Tensor:
    config = settings().content
    assert config
    encoder = ItemEncoder(folder / "bundle", config, folder)
    parts = []
    for start in range(0, len(rows), ITEMS_PER_BATCH):  # batched as the content stage did
        part = rows[start : start + ITEMS_PER_BATCH]
        values = {name: [row[name] for row in part] for name in ("text", "image")}
        parts.append(encoder(values).vectors_ND)
    return torch.cat(parts)


def vectors_of(predictor: Predictor, item_ids: list[int]) -> Tensor:
    """What the model reads of some items, in their order."""
    assert predictor.content
    assert predictor.item_source
    rows = ItemRows.of(predictor.item_source.index.rows_of(torch.tensor(item_ids)), {})
    return predictor.content.of(rows).vectors_UD[rows.candidate_B]


def write_scoring_samples(path: Path) -> None:
    """Rows 0 and 1 show known items, 2 and 3 new ones; row 1 remembers a new one."""
    items, past = [7, 8, NEW, OTHER_NEW], [[1, 2], [NEW], [3], []]
    table = pa.table(
        {
            **{f"key:{name}": np.arange(4) for name in ("request_id", "user_id", "timestamp")},
            "key:item_id": items,
            "sparse:user_id": np.arange(4),
            "sparse:item_id": items,
            "sequence:past_item": pa.array(past, pa.list_(pa.int64())),
        }
    )
    pq.write_table(table, path)


def score(bundle: Path, folder: Path, *options: str) -> int:
    samples = folder / "scoring.parquet"
    write_scoring_samples(samples)
    command = ["score", "--bundle", str(bundle), "--samples", str(samples)]
    return main([*command, "--output", str(folder / "scores.parquet"), *options])


def scores(folder: Path) -> np.ndarray:
    return pq.read_table(folder / "scores.parquet")["probability:click"].to_numpy()


# --- the same vectors ----------------------------------------------------------------------------


def test_known_items_get_the_vectors_that_training_stored(published: Path) -> None:
    torch.testing.assert_close(
        encode(published, catalogue_rows()), stored_vectors(published), atol=ACCURACY, rtol=ACCURACY
    )


def test_a_tower_of_the_bundle_is_a_plain_model_with_trained_top_layers(published: Path) -> None:
    config = settings().content
    assert config
    for name, tower in config.towers.items():
        folder = published / "bundle" / "encoder" / name
        assert not [
            weight for weight in load_file(folder / "model.safetensors") if "lora" in weight
        ]
        start, found = (
            load_model(tower).state_dict(),
            AutoModel.from_pretrained(folder).state_dict(),
        )
        assert start.keys() == found.keys()
        moved = {w: (found[w] - start[w]).abs().max() for w in start}
        moved = {w: float(most) for w, most in moved.items() if most}
        assert len(moved) == 2, moved  # query and value of the one trainable layer
        assert min(moved.values()) > 100 * ACCURACY


def test_vectors_equal_those_of_the_encoder_with_adapters(published: Path) -> None:
    """Each item alone through the towers with peft's LoRA beside the weights, no store between."""
    config = settings().content
    assert config
    encoder = load_content_encoder(config).eval()
    trained = torch.load(published / "trained.pt")
    prefix = "encoder/"
    load_trained_state(
        encoder, {n.removeprefix(prefix): t for n, t in trained.items() if n.startswith(prefix)}
    )
    lower = {name: load_tower(tower).lower for name, tower in config.towers.items()}
    prepare = {name: build_preparer(tower, published) for name, tower in config.towers.items()}
    rows = [item_row(i) for i in (200, 201, 202)]
    expected = []
    for row in rows:
        tokens = {}
        for name in config.towers:
            half_1LH = lower[name](prepare[name]([row[name]]).inputs).half().clone()
            tokens[name] = ModalityTokens(half_1LH, torch.ones(half_1LH.shape[:2]).bool())
        expected.append(encoder(TokenBatch(tokens))[0].detach())
    # Alone and in a batch, the last bit of a stored half differs now and then.
    torch.testing.assert_close(encode(published, rows), torch.stack(expected), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("twin", [7, TEXT_LESS, PICTURE_LESS, EMPTY])
def test_a_new_item_gets_the_vector_of_a_known_one_with_the_same_content(
    published: Path, tmp_path: Path, twin: int
) -> None:
    dim = stored_vectors(published).shape[1]
    rows = catalogue_rows()
    rows[twin] = {**rows[twin], "item_id": NEW}
    write_catalogue(tmp_path / "more.parquet", rows, row_group_size=ITEMS_PER_BATCH)
    predictor = Predictor(published / "bundle")

    new = new_items.encode_new_items(predictor, tmp_path / "more.parquet", lambda *_: None)

    assert new.items.item_ids_N.tolist() == [NEW]
    assert new.num_listed == NUM_ITEMS
    lacking = {name: {"missing": 1} for name in ("text", "image") if rows[twin][name] is None}
    assert {name: found for name, found in new.faults.items() if found} == lacking
    torch.testing.assert_close(
        new.items.vectors_ND[0], stored_vectors(published)[twin], atol=1e-3, rtol=1e-3
    )
    torch.testing.assert_close(
        vectors_of(predictor.with_added(new.items), [twin, NEW, NEW + 1]),
        torch.stack([stored_vectors(published)[twin], new.items.vectors_ND[0], torch.zeros(dim)]),
    )
    assert not vectors_of(predictor, [NEW]).any(), "the one before stays as it was"


def test_batches_hold_a_bounded_number_of_items_and_lose_none(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known and new items mixed over row groups of 5, encoded at most 8 at a time."""
    sizes: list[int] = []

    class Counted(ItemEncoder):
        def __call__(self, values):  # type: ignore[no-untyped-def]
            sizes.append(len(values["text"]))
            return super().__call__(values)

    monkeypatch.setattr(new_items, "ItemEncoder", Counted)
    rows = [item_row(i if i % 3 else 1000 + i, like=i) for i in range(NUM_ITEMS)]
    rows += [item_row(2000 + i, like=i) for i in range(13)]
    write_catalogue(tmp_path / "more.parquet", rows, row_group_size=5)

    told: list[tuple[int, int]] = []
    new = new_items.encode_new_items(
        Predictor(published / "bundle"),
        tmp_path / "more.parquet",
        lambda done, total: told.append((done, total)),
    )

    wanted = [row["item_id"] for row in rows if row["item_id"] >= NUM_ITEMS]
    assert new.items.item_ids_N.tolist() == wanted
    assert sizes == [8, 8, 7]
    assert told == [(8, 23), (16, 23), (23, 23)]
    expected = encode(published, [row for row in rows if row["item_id"] in set(wanted)])
    torch.testing.assert_close(new.items.vectors_ND, expected, atol=ACCURACY, rtol=ACCURACY)


def test_what_changed_of_an_added_item_is_encoded_anew_and_nothing_else(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[str] = []

    class Counted(ItemEncoder):
        def __call__(self, values):  # type: ignore[no-untyped-def]
            texts.extend(values["text"])
            return super().__call__(values)

    monkeypatch.setattr(new_items, "ItemEncoder", Counted)
    path = tmp_path / "items.parquet"
    rows = [item_row(i) for i in (7, NEW, OTHER_NEW, 102)]
    write_catalogue(path, rows)
    known = Predictor(published / "bundle")
    known = known.with_added(new_items.encode_new_items(known, path, lambda *_: None).items)
    texts.clear()
    changed = item_row(OTHER_NEW, like=300)
    write_catalogue(path, [changed, rows[0], {**rows[3], "image": picture(300)}, rows[1]])

    new = new_items.encode_new_items(known, path, lambda *_: None)

    assert texts == [changed["text"], rows[3]["text"]]
    assert str(new).startswith("3 of 4 items are new and 2 of them were encoded")
    torch.testing.assert_close(
        vectors_of(known.with_added(new.items), [NEW, OTHER_NEW, 102]),
        encode(published, [rows[1], changed, {**rows[3], "image": picture(300)}]),
        atol=1e-3,
        rtol=1e-3,
    )
    write_catalogue(path, rows[:2])
    fewer = new_items.encode_new_items(known.with_added(new.items), path, lambda *_: None)
    assert fewer.items.item_ids_N.tolist() == [NEW], "as if the file had always been so"


def test_a_catalogue_that_is_replaced_while_it_is_read_is_read_as_it_was(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of the next file stand elsewhere: a known item would be taken for a new one."""
    path, other = tmp_path / "items.parquet", tmp_path / "other.parquet"
    rows = [item_row(NEW + i) for i in range(2 * ITEMS_PER_BATCH)]
    write_catalogue(path, rows, row_group_size=ITEMS_PER_BATCH)
    write_catalogue(other, catalogue_rows()[: len(rows)], row_group_size=ITEMS_PER_BATCH)

    class Replacing(ItemEncoder):
        def __call__(self, values):  # type: ignore[no-untyped-def]
            if other.exists():
                other.replace(path)
            return super().__call__(values)

    monkeypatch.setattr(new_items, "ItemEncoder", Replacing)

    new = new_items.encode_new_items(Predictor(published / "bundle"), path, lambda *_: None)

    assert new.items.item_ids_N.tolist() == [row["item_id"] for row in rows]
    expected = encode(published, rows)
    torch.testing.assert_close(new.items.vectors_ND, expected, atol=ACCURACY, rtol=ACCURACY)


def test_the_encoder_of_another_bundle_in_the_same_place_is_not_used(
    published: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(published / "bundle", bundle)
    predictor = Predictor(bundle)
    head = bundle / "encoder" / "head.safetensors"
    weights = {name: weight + 1 for name, weight in load_file(head).items()}
    save_file(weights, head)
    write_catalogue(tmp_path / "items.parquet", [item_row(NEW)])

    with pytest.raises(UserError, match="head.safetensors is missing or damaged"):
        new_items.encode_new_items(predictor, tmp_path / "items.parquet", lambda *_: None)


# --- scores --------------------------------------------------------------------------------------


def test_new_items_are_scored_by_their_content(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = published / "bundle"
    assert score(bundle, tmp_path) == 0
    assert "2 of them show an item without a content vector" in capsys.readouterr().out
    without = scores(tmp_path)
    write_catalogue(tmp_path / "today.parquet", [item_row(i) for i in (7, NEW, OTHER_NEW)])

    assert score(bundle, tmp_path, "--items", str(tmp_path / "today.parquet")) == 0

    printed = capsys.readouterr().out.replace("\n", "")
    assert "2 of 3 items are new and were encoded" in printed
    assert "without a content vector" not in printed
    found = scores(tmp_path)
    assert found[0] == without[0]
    assert (np.abs(found[1:] - without[1:]) > 100 * ACCURACY).all()


def test_new_items_are_served_as_they_are_scored_offline(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that come while a service runs, with its bundle as it is."""
    bundle = with_event_columns(published / "bundle", tmp_path / "bundle")
    catalogue = tmp_path / "items.parquet"
    write_catalogue(catalogue, catalogue_rows())
    live = LiveModel(ModelSource(bundle=bundle, data=tmp_path))
    before = live.now
    rows = pq.read_table(published / "samples.parquet").slice(0, 1).to_pylist()[0]
    request = ScoreRequest(
        user_id=rows["key:user_id"],
        candidates=[NEW, 1, OTHER_NEW],
        timestamp=1000,
        histories={"past": {"item_id": [2, NEW], "timestamp": [1, 2]}},
    )
    write_catalogue(catalogue, [*catalogue_rows(), item_row(NEW), item_row(OTHER_NEW, like=1)])

    assert live.refresh()

    assert live.now.predictor.model is before.predictor.model
    served, older = (
        one.scorer.score([one.scorer.rows(request, 0)])[0].probs_BT[:, 0]
        for one in (live.now, before)
    )
    samples = tmp_path / "scoring.parquet"
    columns = {
        "key:request_id": [0, 1, 2],
        "key:user_id": [request.user_id] * 3,
        "key:item_id": request.candidates,
        "key:timestamp": [1000] * 3,
        "sparse:user_id": [request.user_id] * 3,
        "sparse:item_id": request.candidates,
        "sequence:past_item": pa.array([[2, NEW]] * 3, pa.list_(pa.int64())),
    }
    pq.write_table(pa.table(columns), samples)
    command = ["score", "--bundle", str(bundle), "--samples", str(samples)]
    command += ["--items", str(catalogue), "-o", str(tmp_path / "scores.parquet")]
    assert main(command) == 0
    offline = pq.read_table(tmp_path / "scores.parquet")["probability:click"].to_numpy()
    torch.testing.assert_close(served, torch.from_numpy(offline.copy()), atol=1e-6, rtol=0)
    assert (served - older).abs().min() > 1e-6, "all three read the content of a new item"
    with monkeypatch.context() as patch:
        write_catalogue(catalogue, [*catalogue_rows(), item_row(NEW, like=1)])
        patch.setattr(live_model, "Scorer", Mock(side_effect=UserError("no score")))
        assert not live.refresh()
    again = live.now.scorer.score([live.now.scorer.rows(request, 0)])[0].probs_BT[:, 0]
    assert torch.equal(again, served), "nothing of the catalogue that did not stand is kept"


def with_event_columns(bundle: Path, copy: Path) -> Path:
    """The bundle, as publishing makes it of a log with integer ids."""
    shutil.copytree(bundle, copy)
    told = json.loads((copy / "bundle.json").read_text())
    told["event_columns"] = {name: {"values": "integer"} for name in ("user_id", "item_id")}
    (copy / "bundle.json").write_text(json.dumps(told))
    return copy


# --- what the user must change -------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["head.safetensors", "text/model.safetensors", "image/config.json"]
)
@pytest.mark.parametrize("is_missing", [True, False])
def test_a_damaged_encoder_file_is_named(
    published: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    is_missing: bool,
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(published / "bundle", bundle)
    file = bundle / "encoder" / name
    content = file.read_bytes()
    file.unlink()
    if not is_missing:
        file.write_bytes(content[:-1] + b"?")

    error = refused(capsys, score(bundle, tmp_path))

    assert f"bundle file {file} is missing or damaged" in error
    assert "publish it again" in error


def test_a_bundle_without_encoder_says_how_to_get_one(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As they were published before encoders were part of bundles."""
    bundle = tmp_path / "bundle"
    shutil.copytree(published / "bundle", bundle, ignore=shutil.ignore_patterns("encoder"))
    described = Predictor(published / "bundle").bundle
    files = {n: sha for n, sha in described.files.items() if not n.startswith("encoder/")}
    described = described.model_copy(update={"files": files})
    (bundle / "bundle.json").write_text(described.model_dump_json())
    items = str(published / "items.parquet")

    error = refused(capsys, score(bundle, tmp_path, "--items", items))

    assert "published without its content encoder" in error
    assert "braid run" in error
    assert score(bundle, tmp_path) == 0


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"item_id": [1], "text": ["a"]}, "must have one column 'image'"),
        ({"text": ["a"], "image": [b"a"]}, "must have one column 'item_id'"),
        ({"item_id": [1], "text": [5], "image": [b"a"]}, "'text' has type int64 but must be a str"),
        ({"item_id": [1.5], "text": ["a"], "image": [b"a"]}, "'item_id' has type double but must"),
        ({"item_id": [9, 9], "text": ["a"] * 2, "image": [b"a"] * 2}, "item_id 9 has more than"),
        (
            {"item_id": [1, None], "text": ["a"] * 2, "image": [b"a"] * 2},
            "item_id is null in 1 row",
        ),
    ],
)
def test_a_catalogue_that_cannot_be_encoded_is_refused(
    published: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    table: dict[str, list[object]],
    message: str,
) -> None:
    path = tmp_path / "items.parquet"
    pq.write_table(pa.table(table), path)

    error = refused(capsys, score(published / "bundle", tmp_path, "--items", str(path)))

    assert f"--items {path}" in error
    assert message in error
    assert not (tmp_path / "scores.parquet").exists()


def test_a_catalogue_that_is_not_there_is_refused(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(capsys, score(published / "bundle", tmp_path, "--items", str(tmp_path / "no")))
    assert "is no file; give a Parquet file with item_id" in error


def test_a_model_without_content_takes_no_items(published: Path) -> None:
    predictor = Predictor(published / "bundle")
    predictor.content = None  # as in a bundle whose recipe has none
    with pytest.raises(UserError, match="reads no content of items; leave out --items"):
        new_items.encode_new_items(predictor, published / "items.parquet", lambda *_: None)
