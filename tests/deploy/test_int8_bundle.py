"""A bundle with int8 tables scores what an fp32 bundle of the same values does."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deploy.app import main
from deploy.bundle import BUNDLE_FILE, read_bundle, write_bundle
from deploy.predictor import Predictor
from embedding.checkpoint_files import step_directory
from embedding.errors import UserError
from embedding.files import file_sha256
from embedding.int8_tables import Int8Tables
from embedding.loader import SampleFiles, SampleLoader
from embedding.stored import CheckpointReader
from pipeline.config import Recipe
from tests.deploy.published import settings
from tests.deploy.refusal import refused
from tests.pipeline.small_log import file_bytes

HALF_A_SCALE = 0.01
"""Above half of the scale of any row of these tables."""


def int8_settings() -> Recipe:
    recipe = settings()
    publish = recipe.publish.model_copy(update={"tables": "int8"})
    return recipe.model_copy(update={"publish": publish})


@pytest.fixture(scope="module")
def int8(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published model again, in int8; tests change copies of it."""
    folder = tmp_path_factory.mktemp("int8") / "bundle"
    write_bundle(int8_settings(), step_directory(published / "checkpoints", 1), folder)
    return folder


def described(directory: Path, change: Any) -> None:
    """Change the description of a bundle whose files were changed."""
    described = json.loads((directory / BUNDLE_FILE).read_text())
    change(described)
    described["files"] = {
        str(path.relative_to(directory)): file_sha256(path)
        for path in directory.rglob("*")
        if path.is_file() and path.name != BUNDLE_FILE
    }
    (directory / BUNDLE_FILE).write_text(json.dumps(described))


def with_naive_weights(int8: Path, folder: Path) -> Path:
    """An fp32 bundle of what the bytes of an int8 bundle stand for."""
    shutil.copytree(int8, folder)
    for file in (folder / "tables").iterdir():
        rows = load_file(file)["rows"].numpy()
        scale, bias = np.split(rows[:, -8:].copy().view(np.float32), 2, axis=1)
        weight = rows[:, :-8].astype(np.float32) * scale + bias
        save_file({"weight": torch.from_numpy(weight)}, file)
    described(folder, lambda bundle: bundle.update(table_precision="fp32"))
    return folder


def scores(bundle: Path, samples: Path, batch_size: int = 64) -> Tensor:
    predictor = Predictor(bundle)
    files = SampleFiles([samples], predictor.schema, tasks=(), items=predictor.item_source)
    with SampleLoader(files, batch_size_per_rank=batch_size).sequential() as stream:
        return torch.cat([predictor.predict(batch)[: batch.num_rows] for batch in stream])


def test_elements_are_those_of_the_checkpoint_within_half_a_scale(
    published: Path, int8: Path
) -> None:
    bundle = read_bundle(int8)
    assert bundle.table_precision == "int8"
    assert read_bundle(published / "bundle").table_precision == "fp32"
    reader = CheckpointReader(step_directory(published / "checkpoints", 1))
    for name, table in bundle.tables.items():
        trained = reader.read(f"tables/{name}/weight").numpy()
        rows = np.concatenate([load_file(int8 / file)["rows"].numpy() for file in table.files])
        assert rows.shape == (table.num_rows, table.embedding_dim + 8)
        scale, bias = np.split(rows[:, -8:].copy().view(np.float32), 2, axis=1)
        spread = trained.max(axis=1) - trained.min(axis=1)
        np.testing.assert_allclose(scale[:, 0], spread / 255, rtol=1e-6)
        np.testing.assert_array_equal(bias[:, 0], trained.min(axis=1))
        error = np.abs(rows[:, :-8] * scale + bias - trained)
        assert (error <= scale / 2 + 1e-6).all()
        assert 0 < scale.max() / 2 < HALF_A_SCALE


def test_all_but_tables_is_as_in_fp32(published: Path, int8: Path) -> None:
    def others(folder: Path) -> dict[str, bytes]:
        found = file_bytes(folder)
        return {k: v for k, v in found.items() if not k.startswith(("tables/", BUNDLE_FILE))}

    assert others(int8) == others(published / "bundle")


def test_scores_are_those_of_fp32_tables_with_the_same_values(
    published: Path, int8: Path, tmp_path: Path
) -> None:
    samples = published / "samples.parquet"

    found = scores(int8, samples)

    naive = scores(with_naive_weights(int8, tmp_path / "naive"), samples)
    torch.testing.assert_close(found, naive, atol=1e-5, rtol=0)
    trained = scores(published / "bundle", samples)
    torch.testing.assert_close(found, trained, atol=0.02, rtol=0)
    assert not torch.equal(found, trained)


def test_tables_stay_in_int8_and_the_model_has_no_others(int8: Path) -> None:
    predictor = Predictor(int8)
    assert isinstance(predictor.tables, Int8Tables)
    assert {rows.dtype for rows in predictor.tables.rows.values()} == {torch.uint8}
    assert {weight.device.type for weight in predictor.model.tables.parameters()} == {"meta"}


def test_ids_of_managed_tables_are_mapped_before(
    published: Path, int8: Path, tmp_path: Path
) -> None:
    """Items 0 to 9 have rows of their own in the first of two shards, any other an unknown row."""

    def managed(bundle: dict[str, Any]) -> None:
        (table,) = (t for t in bundle["recipe"]["features"]["tables"] if t["name"] == "item")
        table["ids"] = {"kind": "managed_collision"}
        bundle["tables"]["item"]["segments"] = [[0, 20], [20, 40]]

    bundles = shutil.copytree(int8, tmp_path / "int8"), with_naive_weights(int8, tmp_path / "fp32")
    for bundle in bundles:
        rows = {"ids": torch.arange(10), "rows": torch.arange(10).flip(0).contiguous()}
        save_file(rows, bundle / "ids" / "item.safetensors")
        described(bundle, managed)

    of_int8, of_fp32 = (scores(bundle, published / "samples.parquet") for bundle in bundles)

    torch.testing.assert_close(of_int8, of_fp32, atol=1e-5, rtol=0)
    assert not torch.allclose(of_int8, scores(int8, published / "samples.parquet"), atol=1e-3)


def test_a_damaged_table_is_named(
    int8: Path, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = shutil.copytree(int8, tmp_path / "bundle")
    file = next((bundle / "tables").iterdir())
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)

    command = ["score", "--bundle", str(bundle), "--samples", str(published / "samples.parquet")]
    error = refused(capsys, main([*command, "--output", str(tmp_path / "scores.parquet")]))

    assert f"bundle file {file} is missing or damaged" in error


def test_a_value_that_is_not_finite_is_not_hidden(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Path) -> Any:
        weight = torch.zeros(4, 8)
        weight[2, 1] = torch.nan
        yield "item", iter([(32, weight)])

    monkeypatch.setattr("deploy.bundle.read_tables", broken)
    checkpoint = step_directory(published / "checkpoints", 1)
    with pytest.raises(UserError, match=r"table 'item': row 34 holds .* not finite.*tables=fp32"):
        write_bundle(int8_settings(), checkpoint, tmp_path / "bundle")
