"""One training step on real codes: what the ranking loss moves, and what it cannot reach.

The loss must reach the rows of the tables that a batch looks up, for each family of derived
features, and must not reach what made the codes: the content encoder and the codebooks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from embedding.feature_schema import FeatureSchema
from embedding.hashing import rows_of
from embedding.loader import SampleFiles, SampleLoader
from multimodal.codes.config import Codes
from multimodal.codes.schema import features_with_codes
from multimodal.codes.store import Codebooks
from multimodal.codes.versions import load_version
from multimodal.content_encoder import ContentEncoder, load_content_encoder
from pipeline.codes.columns import code_columns
from pipeline.codes.features import CODES_FILE, ItemCodes
from pipeline.codes.item_vectors import ItemVectors
from pipeline.codes.quantize import quantize
from ranking.config import RankingConfig
from ranking.model import RankingModel, RankingStep
from tests.multimodal.small_models import random_tokens, tiny_config

NUM_ITEMS, NUM_ROWS, NO_CODES = 40, 64, 40
CODES = Codes.model_validate(
    {
        "rq": {"num_levels": 2, "codebook_size": 6},
        "vq": {"top_k": 3, "max_items": 50},
        "suffix": {"num_codes": 20},
        "features": {"item_table": "like", "embedding_dim": 8, "user_rows": 997, "vector_dims": 2},
    }
)
OWN = FeatureSchema.model_validate(
    {
        "tables": [
            {"name": "item", "num_embeddings": 50, "embedding_dim": 8},
            {
                **{"name": "like", "num_embeddings": 50, "embedding_dim": 8},
                "ids": {"kind": "identity"},
            },
        ],
        "sparse": [{"name": "item_id", "table": "item"}],
        "histories": [{"name": "clicks"}],
        "sequences": [
            {
                **{"name": "past_item", "history": "clicks", "table": "item"},
                **{"column": "item_id", "target": "item_id"},
            },
            {"name": "past_like", "history": "clicks", "table": "like", "column": "item_id"},
        ],
    }
)


@dataclass(frozen=True)
class Coded:
    """Items with vectors of a content encoder, and the codes that fitted codebooks give them."""

    encoder: ContentEncoder
    vectors_ND: torch.Tensor
    """With the graph that leads to the encoder."""
    root: Path
    books: Codebooks
    codes: pa.Table


@pytest.fixture
def coded(tmp_path: Path) -> Coded:
    torch.manual_seed(0)
    encoder = load_content_encoder(tiny_config(text={"lora": {"rank": 2}}))
    vectors_ND = encoder(random_tokens(NUM_ITEMS))
    known = vectors_ND.detach().numpy().copy()
    scratch, root = tmp_path / "day", tmp_path / "codebooks"
    scratch.mkdir()
    items = ItemVectors(np.arange(NUM_ITEMS), known, "tower", "2026-01-01", "2026-01-01")
    facts = quantize(CODES, items, root, scratch)
    books = load_version(root, facts.version)
    assert books.residual
    books.residual.codebooks_LKD.requires_grad_()
    return Coded(encoder, vectors_ND, root, books, pq.read_table(scratch / CODES_FILE))


@dataclass(frozen=True)
class Events:
    """Candidates, users and histories; one item has no codes."""

    items: list[int]
    users: list[int]
    past: list[list[int]]

    @classmethod
    def drawn(cls) -> "Events":
        rng = np.random.default_rng(3)
        return cls(
            [NO_CODES, *rng.integers(0, NUM_ITEMS // 2, NUM_ROWS - 1).tolist()],
            rng.integers(0, 5, NUM_ROWS).tolist(),
            [rng.integers(0, NUM_ITEMS // 2, rng.integers(1, 6)).tolist() for _ in range(NUM_ROWS)],
        )

    def write(self, schema: FeatureSchema, codes: ItemCodes, path: Path) -> None:
        lists = pa.array(self.past, pa.list_(pa.int64()))
        events = pa.record_batch(
            {"item_id": self.items, "user_id": self.users, "history:clicks:item_id": lists}
        )
        columns = {f"key:{k}": np.arange(NUM_ROWS) for k in ("request_id", "timestamp")}
        columns |= {"key:user_id": self.users, "key:item_id": self.items}
        columns |= {"sparse:item_id": self.items, "sequence:past_item": lists}
        columns |= {"sequence:past_like": lists, **code_columns(schema, codes, events)}
        labels = np.random.default_rng(4).integers(0, 2, NUM_ROWS).astype(np.float32)
        pq.write_table(pa.table({**columns, "label:click": labels}), path)


def sid(coded: Coded, level: str) -> dict[int, int]:
    return dict(
        zip(coded.codes["item_id"].to_pylist(), coded.codes[level].to_pylist(), strict=True)
    )


def of_candidates(coded: Coded, events: Events, _: pa.Table) -> dict[str, set[int]]:
    found = {}
    for level in ("sid_0", "sid_1", "sid_suffix"):
        code = sid(coded, level)
        found[level] = {1 + code[i] if i in code else 0 for i in events.items}
    near = sid(coded, "vq")
    rows = [[1 + slot for slot in near[i]] if i in near else [0] for i in events.items]  # type: ignore[attr-defined]
    return {**found, "vq": {row for own in rows for row in own}}


def of_histories(coded: Coded, events: Events, _: pa.Table) -> dict[str, set[int]]:
    past = {item for items in events.past for item in items}
    found = {level: {1 + sid(coded, level)[i] for i in past} for level in ("sid_0", "sid_1")}
    return {**found, "vq": {1 + sid(coded, "vq_nearest")[i] for i in past}}


def of_shared_items(coded: Coded, events: Events, _: pa.Table) -> dict[str, set[int]]:
    code = sid(coded, "sid_0")
    shared = {
        item
        for own, items in zip(events.items, events.past, strict=True)
        for item in items
        if own in code and code[own] == code[item]
    }
    return {"like": {1 + item for item in shared}}


def of_users(_: Coded, __: Events, samples: pa.Table) -> dict[str, set[int]]:
    schema = features_with_codes(OWN, with_family("user"))
    return {
        name: set(
            rows_of(
                torch.tensor(samples[f"sparse:{name}"].to_pylist()), schema.table(name)
            ).tolist()
        )
        for name in ("user_code_1", "user_code_2")
    }


def with_family(family: str) -> Codes:
    features = CODES.features.model_copy(update={"families": (family,)})
    return CODES.model_copy(update={"features": features})


@pytest.mark.parametrize(
    ("family", "looked_up"),
    [
        ("candidate", of_candidates),
        ("history", of_histories),
        ("shared", of_shared_items),
        ("user", of_users),
    ],
)
def test_the_loss_moves_the_rows_of_codes_and_nothing_that_made_them(
    tmp_path: Path,
    coded: Coded,
    family: str,
    looked_up: Callable[[Coded, Events, pa.Table], dict[str, set[int]]],
) -> None:
    schema = features_with_codes(OWN, with_family(family))
    path = tmp_path / "samples.parquet"
    events = Events.drawn()
    events.write(schema, ItemCodes.of(coded.codes), path)
    # The history's codes are attended to; the others are read without any interest, so that what
    # a table gets can only come from the family.
    interests = (
        [{"kind": "din", "history": "clicks", "hidden": [16]}] if family == "history" else []
    )
    model = {
        "interests": interests,
        "classifier": {"kind": "dnn", "hidden": [32], "dropout": 0.0},
    }
    config = RankingConfig.model_validate({"tasks": [{"name": "click"}], "model": model})
    built = RankingModel(schema, config, tables_device=torch.device("cpu"))
    built.tables.initialize(seed=0)
    step = RankingStep(built, config)
    files = SampleFiles([path], schema, ["click"])
    with SampleLoader(files, batch_size_per_rank=NUM_ROWS).sequential() as stream:
        batch = next(iter(stream))
    tables = {name.split(".")[-2]: p for name, p in built.tables.named_parameters()}
    before = {name: table.detach().clone() for name, table in tables.items()}
    encoder_before = {name: p.detach().clone() for name, p in coded.encoder.named_parameters()}

    loss, _ = step(batch)
    loss.backward()
    torch.optim.SGD(step.parameters(), lr=1.0).step()

    for name, rows in looked_up(coded, events, pq.read_table(path)).items():
        assert len(rows) >= 3, name
        gradient = tables[name].grad
        assert gradient is not None, name
        with_gradient = set(gradient.abs().sum(dim=1).nonzero().squeeze(1).tolist())
        assert with_gradient <= rows, name
        # Not all: a sample's hidden units may all be below zero.
        assert len(with_gradient) >= 0.9 * len(rows), name
        moved = (tables[name].detach() != before[name]).any(dim=1).nonzero().squeeze(1)
        assert set(moved.tolist()) == with_gradient, name
    require_untouched(coded, encoder_before)
    own = {p.data_ptr() for p in coded.encoder.parameters()}
    assert not own & {p.data_ptr() for p in step.parameters()}


def require_untouched(coded: Coded, encoder_before: dict[str, torch.Tensor]) -> None:
    """The encoder, its vectors and the codebooks are as they were, and have no gradient."""
    for name, parameter in coded.encoder.named_parameters():
        assert parameter.grad is None, name
        assert torch.equal(parameter.detach(), encoder_before[name]), name
    assert coded.books.residual
    codebooks_LKD = coded.books.residual.codebooks_LKD
    assert codebooks_LKD.grad is None
    published = load_version(coded.root, "v0001")
    assert published.residual
    assert torch.equal(published.residual.codebooks_LKD, codebooks_LKD.detach())
    assert coded.books.items
    assert published.items
    assert (published.items.vectors_ND == coded.books.items.vectors_ND).all()


def test_there_is_no_way_from_codes_back_to_vectors_and_codebooks(coded: Coded) -> None:
    """A straight-through estimator, or soft codes, would lead there.

    Codes are integers, and the search for them takes no tensors that ask for a gradient.
    """
    assert coded.books.residual
    assert coded.vectors_ND.requires_grad
    with pytest.raises(RuntimeError, match="automatic differentiation"):
        coded.books.residual.encode_tensor(coded.vectors_ND)
    with torch.no_grad():
        codes_NL, _ = coded.books.residual.encode_tensor(coded.vectors_ND)
    assert not codes_NL.is_floating_point()
    expected = [coded.codes[f"sid_{level}"].to_pylist() for level in (0, 1)]
    assert codes_NL.T.tolist() == expected
