"""Recipes of content are checked without torch, and errors name the remedy."""

import re
import subprocess
import sys

import pytest
from pydantic import ValidationError

from multimodal.content_config import (
    ConcatFusion,
    ContentConfig,
    FqFormer,
    ImageTower,
    Lora,
    MeanFusion,
    Service,
    TextTower,
)


def test_defaults_are_tiny_towers_an_fq_former_and_inline_placement() -> None:
    config = ContentConfig(text=TextTower(), image=ImageTower())
    assert list(config.towers) == ["text", "image"]
    assert isinstance(config.fusion, FqFormer)
    assert config.placement.kind == "inline"


def test_a_written_config_reads_back_equal() -> None:
    config = ContentConfig(
        text=TextTower(model="package:some_package/model", trainable_layers=2),
        fusion=MeanFusion(),
        placement=Service(num_actors=2, staleness=1),
    )
    assert ContentConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "both null"),
        ({"text": {}, "dim": 30}, "dim=30 .* use 32"),
        (
            {"text": {}, "fusion": {"kind": "fq_former", "dim": 30}},
            "fusion.dim=30 .* use 32",
        ),
        ({"text": {}, "frozen": True}, "set text.lora to null"),
        (
            {"text": {"lora": None}, "frozen": True, "placement": {"kind": "service"}},
            "set placement to {kind: inline}",
        ),
        ({"text": {"column": "a"}, "image": {"column": "a"}}, "name two"),
        ({"text": {"lora": {"target_modules": []}}}, "leave it out"),
        ({"text": {}, "fusion": {"kind": "sum"}}, "fq_former"),
        ({"text": {"image_size": 64}}, "Extra inputs"),
    ],
)
def test_a_wrong_config_says_what_to_do(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ContentConfig.model_validate(fields)


def test_dim_is_free_where_no_heads_share_it() -> None:
    assert ContentConfig(text=TextTower(), dim=30, fusion=ConcatFusion()).dim == 30


def test_without_lora_no_layer_runs_in_the_step() -> None:
    assert TextTower(trainable_layers=2, lora=None).layers_in_step == 0
    assert ImageTower(trainable_layers=2, lora=Lora(rank=4)).layers_in_step == 2


def test_the_config_imports_nothing_heavy() -> None:
    code = (
        "import sys, multimodal.content_config; "
        "print([m for m in ('torch', 'transformers', 'numpy', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("gpus", "on_gpu", "obstacle"),
    [
        (0, False, None),
        (1, True, None),
        (2, True, None),
        (0, True, r"ranks run on GPUs and the actors on CPUs \(gpus_per_actor=0\)"),
        (1, False, r"ranks run on CPUs and the actors on GPUs \(gpus_per_actor=1\)"),
        (0.5, True, r"actors share a GPU \(gpus_per_actor=0.5\), and NCCL takes one process"),
    ],
)
def test_the_direct_transport_is_taken_where_all_have_gpus_of_their_own(
    gpus: float, on_gpu: bool, obstacle: str | None
) -> None:
    found = Service(gpus_per_actor=gpus).obstacle(ranks_on_gpu=on_gpu)
    assert found is None if obstacle is None else re.search(obstacle, found or "")
    chosen = {
        transport: Service(gpus_per_actor=gpus, transport=transport).is_direct(ranks_on_gpu=on_gpu)
        for transport in ("auto", "object_store", "direct")
    }
    assert chosen == {
        "auto": on_gpu and obstacle is None,
        "object_store": False,
        "direct": True,
    }
