"""A rank that only predicts takes what any rank has trained."""

from pathlib import Path

import pytest
import torch

from embedding import precision
from embedding.errors import UserError
from pipeline.content.paths import ContentPaths
from pipeline.content.training import rank_content
from tests.pipeline.content_steps import one_process, recipe, write_inputs

CPU = torch.device("cpu")


@pytest.mark.parametrize("placement", [{"kind": "inline"}, {"kind": "service"}])
def test_prediction_needs_no_precision_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, placement: dict[str, str]
) -> None:
    """Actors with GPUs, say, trained it in bf16, and the ranks have CPUs that cannot."""
    write_inputs(tmp_path)
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: False)
    paths = ContentPaths(index=tmp_path / "index", stores=tmp_path / "stores")
    vectors = []
    with one_process():
        for trained_in in ("fp32", "bf16"):
            settings = recipe(precision=trained_in, placement=placement)
            content = rank_content(settings, paths, CPU, predicts=True)
            assert content is not None
            content.source.refresh()
            vectors.append(content.source.bank.fused_RH)
            content.source.close()
        with pytest.raises(UserError, match=r"content\.precision=bf16: this CPU has neither"):
            rank_content(recipe(precision="bf16"), paths, CPU)
    assert vectors[0].equal(vectors[1])
