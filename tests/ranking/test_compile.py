"""The compiled ranker against its eager twin."""

import shutil

import pytest
import torch

from embedding.errors import UserError
from embedding.tables import EmbeddedBatch
from ranking.classifier_config import Ipnn
from ranking.config import ModelConfig
from ranking.fgcnn_config import Fgcnn
from ranking.model import Ranker
from tests.ranking.test_fields import schema_of

CONFIG = ModelConfig(
    generator=Fgcnn(maps=(3,), heights=(3,), pools=(2,), new_maps=(2,)),
    classifier=Ipnn(hidden=(16,)),
)
COMPILED = CONFIG.model_copy(update={"compile": True})


@pytest.mark.integration
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on CPU")
def test_compiled_ranker_agrees_with_eager_in_logits_and_gradients() -> None:
    torch.manual_seed(0)
    schema = schema_of(8, 8, 8)
    eager, compiled = (
        Ranker(schema, config, num_tasks=1, autocast=False) for config in (CONFIG, COMPILED)
    )
    compiled.load_state_dict(eager.state_dict())
    fields_BX = torch.randn(8, 48, requires_grad=True)
    embedded = EmbeddedBatch(
        fields_BD=fields_BX,
        field_names=("f0", "f1", "f2"),
        field_dims=(16, 16, 16),
        sequences={},
        lengths={},
    )

    outputs, gradients = [], []
    for ranker in (eager, compiled):
        logits_BT = ranker(embedded, torch.zeros(8, 0))
        outputs.append(logits_BT)
        wanted = [fields_BX, *ranker.parameters()]
        gradients.append(torch.autograd.grad(logits_BT.square().sum(), wanted))

    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    for ours, twin in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(ours, twin, rtol=1e-4, atol=1e-5)


def test_compilation_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"ranking.model.compile=true .*install one"):
        Ranker(schema_of(8, 8, 8), COMPILED, num_tasks=1, autocast=False)
