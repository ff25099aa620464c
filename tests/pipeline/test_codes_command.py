"""`braid codes` against codes artifacts written by the quantize stage's own functions."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deploy.app import main
from embedding.raw_ids import to_raw_ids
from multimodal.codes.config import Codes
from multimodal.codes.versions import find_version
from pipeline.artifacts import Manifest, publish
from pipeline.codes.features import CODES_FILE
from pipeline.codes.item_vectors import ItemVectors
from pipeline.codes.lookup import CodesOfRun
from pipeline.codes.quantize import quantize
from pipeline.recipe import write_recipe
from tests.pipeline.small_log import make_recipe
from tests.pipeline.stage_facts import coded

CODES = Codes.model_validate(
    {"rq": {"num_levels": 3, "codebook_size": 4}, "vq": {"top_k": 3}, "suffix": {"num_codes": 3}}
)
NAMES = [f"film-{i}" for i in range(60)]
DAYS = ("2026-01-01", "2026-01-02")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs; the second fitted its codebooks anew. The catalogue has a title for each item."""
    folder = tmp_path_factory.mktemp("codes")
    root, out = folder / "data", folder / "runs"
    root.mkdir()
    titles = [f"Title of {name}" for name in NAMES]
    pq.write_table(pa.table({"item_id": NAMES, "title": titles}), root / "items.parquet")
    ids = np.sort(to_raw_ids(pa.array(NAMES)).to_numpy())
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 6))[np.arange(60) % 5] + 0.4 * rng.standard_normal((60, 6))
    version = None
    for day in DAYS:
        scratch = folder / f"scratch-{day}"
        scratch.mkdir()
        items = ItemVectors(ids, x.astype(np.float32), "tower", DAYS[0], day, version=version)
        facts = quantize(CODES, items, out / "codebooks", scratch, force_refit=version is not None)
        version = facts.version
        (out / day).mkdir(parents=True)
        told = coded(facts, num_without_vector=2)
        manifest = Manifest(stage="quantize", artifact_id=day, config_hash="c", facts=told)
        publish(scratch, out / day / "quantize", manifest)
        write_recipe(make_recipe(root), out / day)
    return out


def table(out: Path, day: str) -> list[dict]:
    return pq.read_table(out / day / "quantize" / CODES_FILE).to_pylist()


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["codes", *words])
    said = capsys.readouterr()
    return code, said.out, " ".join(said.err.split())


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_items_of_a_code_at_every_depth(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    items = table(out, DAYS[1])
    names = dict(zip(to_raw_ids(pa.array(NAMES)).to_pylist(), NAMES, strict=True))
    codes = {row["item_id"]: (row["sid_0"], row["sid_1"], row["sid_2"]) for row in items}
    full = next(iter(codes.values()))
    for depth in (1, 2, 3):
        prefix = full[:depth]
        members = [item for item, code in codes.items() if code[:depth] == prefix]
        text = "-".join(map(str, prefix))

        status, said, _ = run(capsys, "show", "--out", str(out), "--code", text, "--limit", "60")

        assert status == 0
        found = rows(said)
        for item in members:
            row = next(row for row in items if row["item_id"] == item)
            code = "-".join(map(str, (*codes[item], row["sid_suffix"])))
            assert [names[item], code, "Title", "of", names[item]] in found
        assert sum("Title" in row for row in found) == len(members)
        assert f"items of {text} ({len(members)})" in said
        following: dict[int, int] = {}
        for item in members if depth < 3 else ():
            following[codes[item][depth]] = following.get(codes[item][depth], 0) + 1
        for code, count in following.items():
            assert [f"{text}-{code}", str(count)] in found
        assert ("codes that follow" in said) == (depth < 3)
    assert "codebooks v0002" in said
    assert find_version(out / "codebooks", "v0002").fingerprint in said.replace("\n", "")


def test_codes_of_an_item_and_its_nearest_items(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items = table(out, DAYS[0])
    raw = int(to_raw_ids(pa.array(["film-7"]))[0].as_py())
    own = next(row for row in items if row["item_id"] == raw)

    status, said, _ = run(capsys, "show", "--out", str(out), "--date", DAYS[0], "--item", "film-7")

    assert status == 0
    assert "codebooks v0001" in said
    assert "film-7 Title of film-7" in said
    found, prefix = rows(said), []
    for level in ("sid_0", "sid_1", "sid_2"):
        prefix.append(level)
        shared = sum(all(row[name] == own[name] for name in prefix) for row in items)
        text = "-".join(str(own[name]) for name in prefix)
        assert [level, str(own[level]), text, str(shared)] in found
    assert ["sid_suffix", str(own["sid_suffix"])] in found
    near = [row for row in found if row[:1] and row[0].isdigit() and "Title" in row]
    assert [int(row[0]) for row in near] == own["vq"]
    assert "film-7" not in [row[1] for row in near]  # an item leaves itself out


@pytest.mark.parametrize(
    ("kind", "ids"),
    [
        (pa.int64(), [-1, -(2**63), 2**63 - 5, *range(2, 20)]),
        (pa.uint64(), [2**63 + 7, 2**64 - 1, *range(10, 30)]),
        (pa.string(), ["-1", "007", "12", *map(str, range(20, 40))]),
    ],
)
def test_items_are_found_as_the_catalogue_writes_them(
    tmp_path: Path, kind: pa.DataType, ids: list
) -> None:
    """Integers below 0, and from 2^63 on, lose their top bit as raw ids; files in any order."""
    raw = to_raw_ids(pa.array(ids, kind)).to_numpy()
    x = np.random.default_rng(1).standard_normal((len(ids), 6)).astype(np.float32)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    items = ItemVectors(raw, x, "tower", DAYS[0], DAYS[0])
    facts = quantize(CODES, items, tmp_path / "codebooks", scratch)
    manifest = Manifest(stage="quantize", artifact_id="a", config_hash="c", facts=coded(facts))
    (tmp_path / DAYS[0]).mkdir()
    publish(scratch, tmp_path / DAYS[0] / "quantize", manifest)
    whole = {row["item_id"]: row for row in table(tmp_path, DAYS[0])}

    run = CodesOfRun.read(tmp_path)

    assert (np.diff(raw) < 0).any()
    for item, own in zip(ids, raw.tolist(), strict=True):
        row = run.row_of(str(item))
        assert run.item_ids[row] == own
        assert run.slots(row) == whole[own]["vq"]
        assert run.codes[row].tolist() == [whole[own][f"sid_{i}"] for i in range(3)]
    assert set(run.table.column_names) == {"item_id", "sid_0", "sid_1", "sid_2", "sid_suffix"}


def test_levels_and_versions(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said, _ = run(capsys, "show", "--out", str(out))
    assert status == 0
    levels = CodesOfRun.read(out).facts.metrics
    assert levels is not None
    for level, metrics in enumerate(levels.levels):
        row = next(row for row in rows(said) if row[:1] == [f"sid_{level}"])
        assert row[1:3] == ["4", f"{metrics.utilisation:.1%}"]
    assert ["sid_suffix", "3"] in rows(said)

    status, said, _ = run(capsys, "versions", "--out", str(out))
    assert status == 0
    first, second = (find_version(out / "codebooks", name) for name in ("v0001", "v0002"))
    found = {row[0]: row for row in rows(said)}
    for manifest, parent, day in ((first, "-", DAYS[0]), (second, "v0001", DAYS[1])):
        row = found[manifest.version]
        assert row[1:6] == [parent, DAYS[0], "..", day, "60"]
        assert manifest.metrics is not None
        assert row[6] == f"{manifest.metrics.collision_rate:.1%}"
        assert row[-2:] == [manifest.fingerprint, day]
    status, said, _ = run(capsys, "versions", "--out", str(out), "--version", "v0002")
    assert status == 0
    assert ["goes", "on", "with", "v0001"] in rows(said)
    assert ["fingerprint", second.fingerprint] in rows(said)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("show", "--date", "2026-01-09"), "no codes of that date (there are: 2026-01-01, 2026"),
        (("show", "--code", "x-1"), "a code is written level by level"),
        (("show", "--code", "0-4"), "sid_1 has the codes 0 .. 3, not 4"),
        (("show", "--code", "0-0-0-0"), "has 4 levels and codes have 3"),
        (("show", "--item", "film-99"), "codes of 60 items, and it is not among them (2 items"),
        (("show", "--item", "film-1", "--code", "0"), "give --code or --item, not both"),
        (("versions", "--version", "v0009"), "'v0009' is not in"),
    ],
)
def test_what_is_not_there_is_named(
    out: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    status, said, error = run(capsys, *words, "--out", str(out))
    assert status == 2
    assert said == ""
    assert message in " ".join(error.replace("\u2502", " ").split())


def test_a_code_that_no_item_has_names_those_that_items_have(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    had = {(row["sid_0"], row["sid_1"], row["sid_2"]) for row in table(out, DAYS[1])}
    codes = [(a, b, c) for a in range(4) for b in range(4) for c in range(4)]
    absent = next(code for code in codes if code not in had)
    status, _, error = run(capsys, "show", "--out", str(out), "--code", "-".join(map(str, absent)))
    assert status == 2
    assert "no item of 2026-01-02 has it; frequent ones:" in error
    named = error.partition("frequent ones: ")[2].split(", ")
    assert all(any("-".join(map(str, code)).startswith(n) for code in had) for n in named)


def test_directories_without_codes_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, message in (
        (("show",), "holds no run with codes"),
        (("versions",), "holds no codebooks"),
    ):
        status, _, error = run(capsys, *words, "--out", str(tmp_path))
        assert status == 2
        assert message in error
        status, _, error = run(capsys, *words, "--out", str(tmp_path / "nowhere"))
        assert status == 2
        assert json.dumps(str(tmp_path / "nowhere")).strip('"') in error
