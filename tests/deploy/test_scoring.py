"""What `braid score` reads and writes, and that it leaves nothing half-written."""

from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from deploy import predictor as predictor_module
from deploy.app import main
from deploy.bundle import read_bundle
from deploy.predictor import serving_config
from deploy.scoring import require_apart, sample_files, score_samples
from embedding.config import TableConfig
from embedding.feature_schema import FeatureSchema, SparseFeature
from ranking.config import RankingConfig
from tests.deploy.refusal import refused

SCHEMA = FeatureSchema(
    tables=(TableConfig(name="user", num_embeddings=10),),
    sparse=(SparseFeature(name="user_id", table="user"),),
)


def write_samples(path: Path, num_rows: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    names = ("request_id", "user_id", "timestamp", "item_id")
    columns = {f"key:{name}": np.arange(num_rows) for name in names}
    pq.write_table(pa.table({**columns, "sparse:user_id": np.arange(num_rows)}), path)
    return path


def test_of_a_join_artifact_the_samples_are_read_and_not_what_was_held_out(tmp_path: Path) -> None:
    samples = write_samples(tmp_path / "join" / "samples" / "dt=2024-01-01" / "a.parquet")
    held_out = write_samples(tmp_path / "join" / "held_out" / "dt=2024-01-01" / "a.parquet")

    assert sample_files(tmp_path / "join") == [samples]
    assert sample_files(tmp_path / "join" / "held_out") == [held_out]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("folder", "it is a directory; give the name of a file"),
        ("file/scores", "cannot be written"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_bundle_is_read(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    output: str,
    message: str,
) -> None:
    monkeypatch.setattr(predictor_module, "Predictor", Mock(side_effect=AssertionError))
    samples = write_samples(tmp_path / "samples.parquet")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    command = ["score", "--bundle", "bundle", "--samples", str(samples)]

    said = refused(capsys, main([*command, "-o", str(tmp_path / output)]))

    assert f"{tmp_path / output} cannot be written: " in said
    assert message in said


@pytest.mark.parametrize(
    ("given", "output"),
    [
        ("join/samples/day.parquet", "join/samples/day.parquet"),
        ("link.parquet", "join/samples/day.parquet"),
        ("join/samples", "join/samples/day.parquet"),
        ("join/samples", "join/../join/samples/scores.parquet"),
        ("join", "join/samples/new/scores.parquet"),
    ],
)
def test_an_output_among_the_samples_is_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    given: str,
    output: str,
) -> None:
    monkeypatch.setattr(predictor_module, "Predictor", Mock(side_effect=AssertionError))
    samples = write_samples(tmp_path / "join" / "samples" / "day.parquet")
    (tmp_path / "link.parquet").symlink_to(samples)
    before = samples.read_bytes()
    command = ["score", "--bundle", "bundle", "--samples", str(tmp_path / given)]

    said = refused(capsys, main([*command, "-o", str(tmp_path / output)]))

    assert f"--output {tmp_path / output} is or lies in --samples {tmp_path / given}" in said
    assert samples.read_bytes() == before
    assert list((tmp_path / "join").rglob("*.parquet")) == [samples]


def test_beside_the_samples_of_an_artifact_scores_may_lie(tmp_path: Path) -> None:
    write_samples(tmp_path / "join" / "samples" / "day.parquet")

    require_apart(tmp_path / "join" / "scores.parquet", tmp_path / "join")


def test_an_error_leaves_no_half_of_a_file(tmp_path: Path) -> None:
    samples = write_samples(tmp_path / "samples.parquet")
    predict = Mock(side_effect=[torch.full((2, 1), 0.5), RuntimeError("broken")])
    predictor = Mock(tasks=["click"], schema=SCHEMA, item_source=None, predict=predict)
    predictor.bundle.codebooks = None

    with pytest.raises(RuntimeError, match="broken"):
        score_samples(
            predictor,
            [samples],
            tmp_path / "out" / "scores.parquet",
            batch_size=2,
            progress=lambda *_: None,
        )

    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("has_bf16", [True, False])
def test_how_a_model_computes_is_the_machines(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, has_bf16: bool
) -> None:
    """Emulated bf16 takes hundreds of times as long, and compiling needs a compiler."""
    monkeypatch.setattr(predictor_module, "cpu_has_bf16", lambda: has_bf16)
    trained = RankingConfig.model_validate(
        {
            "tasks": [{"name": "click"}],
            "model": {"compile": True, "classifier": {"kind": "deepfm"}},
            "trainer": {"precision": "bf16"},
        }
    )

    served = serving_config(trained)

    assert served.trainer.precision == ("bf16" if has_bf16 else "fp32")
    assert [r.message for r in caplog.records] == [
        "this CPU has no bf16 instructions: the model, trained in bf16, runs in fp32"
    ] * (not has_bf16)
    assert not served.model.compile
    assert served.model.classifier == trained.model.classifier


@pytest.mark.integration
def test_a_bundle_of_another_machine_is_loaded_as_this_one_computes(
    published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictor_module, "cpu_has_bf16", lambda: False)
    monkeypatch.setattr(torch, "compile", Mock(side_effect=AssertionError))
    bundle = read_bundle(published / "bundle")
    ranking = bundle.recipe.ranking
    changed = ranking.model_copy(
        update={
            "model": ranking.model.model_copy(update={"compile": True}),
            "trainer": ranking.trainer.model_copy(update={"precision": "bf16"}),
        }
    )
    recipe = bundle.recipe.model_copy(update={"ranking": changed})
    there = bundle.model_copy(update={"recipe": recipe})
    monkeypatch.setattr(predictor_module, "read_bundle", lambda _: there)

    assert not predictor_module.Predictor(published / "bundle").model.ranker.autocast
