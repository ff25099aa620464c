import pytest
import torch

from embedding import precision
from embedding.errors import UserError
from embedding.precision import check_precision

CPU = torch.device("cpu")


def test_bf16_is_refused_where_it_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: False)
    with pytest.raises(UserError, match=r"trainer.precision=bf16.*set trainer.precision to fp32"):
        check_precision("bf16", CPU, "trainer.precision")
    check_precision("fp32", CPU, "trainer.precision")
    check_precision("bf16", torch.device("cuda"), "trainer.precision")
