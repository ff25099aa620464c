"""Towers split in two: frozen lower layers, run once an item, and upper layers with LoRA.

    inputs -> [ embeddings, lower layers ] -> stored tokens -> [ top layers, final norm ] -> tokens
                frozen                                           LoRA

The split is exact: lower layers never change, so their stored outputs are what an unsplit model
would compute. The pretrained dropout of both parts is off; LoRA's own is the recipe's.

Shapes: U unique items, L token positions, H width of the tower.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PretrainedConfig, PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask

from embedding.errors import UserError
from multimodal.content_config import ImageTower, Lora, TextTower
from multimodal.tower_files import Tower
from multimodal.tower_models import load_model

_LAYERS = ("encoder.layer", "encoder.layers", "layers", "layer", "transformer.layer")
"""Where architectures keep their transformer layers."""
_FINAL_NORMS = ("layernorm", "layer_norm", "norm", "post_layernorm", "encoder.layer_norm")
_QUERY_VALUE = (("query", "value"), ("q_proj", "v_proj"), ("q_lin", "v_lin"))
_POSITIONS_BEHIND_PADDING = ("roberta", "xlm-roberta", "camembert")
"""Kinds of models whose first position is the one behind the padding's id."""
_PROBE_TOLERANCE = 1e-4
_SHORT = 96
"""Token positions."""


class LowerTower(nn.Module):
    """Embeddings and frozen lower layers: model inputs -> tokens to store."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()

    @torch.inference_mode()
    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Tokens (U, L, H) before the first layer that trains."""
        tokens_ULH: Tensor = self.model(**inputs).last_hidden_state
        return tokens_ULH


class UpperTower(nn.Module):
    """The top layers and the final norm; only LoRA in them trains.

    Args:
        layers: top layers of the pretrained model; may be empty.
        norm: the model's final norm; None where it has none, or the stored tokens are behind it.
        config: the pretrained model's.
        has_padding: False where all items have equally many tokens.
    """

    def __init__(
        self, layers: nn.ModuleList, norm: nn.Module | None, config: Any, *, has_padding: bool
    ) -> None:
        super().__init__()
        self.layers = layers.requires_grad_(False)
        self.norm = None if norm is None else norm.requires_grad_(False)
        self.config: PretrainedConfig = config
        self.hidden_size = int(config.hidden_size)
        self.has_padding = has_padding
        self.train(self.training)

    def forward(self, tokens_ULH: Tensor, mask_UL: Tensor) -> Tensor:
        """Final tokens (U, L, H); those at masked positions mean nothing."""
        # An item without the modality attends to zeros and is masked behind: finite whatever it is.
        mask = None
        if self.has_padding and len(self.layers):
            readable_UL = mask_UL | ~mask_UL.any(dim=1, keepdim=True)
            mask = create_bidirectional_mask(self.config, tokens_ULH, readable_UL)
        with _attention_for(tokens_ULH):
            for layer in self.layers:
                out = layer(tokens_ULH, mask)
                tokens_ULH = out[0] if isinstance(out, tuple) else out
        return tokens_ULH if self.norm is None else self.norm(tokens_ULH)

    def train(self, mode: bool = True) -> Self:
        """Training mode reaches LoRA only: the pretrained dropout stays off."""
        super().train(False)
        self.training = mode
        for module in self.modules():
            if isinstance(module, LoraLayer):
                module.lora_dropout.train(mode)
        return self


def _attention_for(tokens_ULH: Tensor) -> AbstractContextManager[None]:
    """The faster attention: on a CPU, the fused one's backward is slow for few positions."""
    is_short = tokens_ULH.shape[1] <= _SHORT and tokens_ULH.device.type == "cpu"
    if not (is_short and torch.is_grad_enabled()):
        return nullcontext()
    context: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
    return context


@dataclass(frozen=True)
class SplitTower:
    """Both parts of one pretrained model."""

    lower: LowerTower
    upper: UpperTower


def load_tower(tower: Tower, *, seed: int = 0) -> SplitTower:
    """Load a pretrained model, split it and put LoRA into its upper part.

    Args:
        tower: the recipe's.
        seed: of LoRA's initial weights.

    Raises:
        UserError: the model is not there or not understood, has too few layers, or LoRA's target
            modules match nothing.
    """
    split = split_tower(tower)
    if tower.lora is not None:
        add_lora(split.upper, tower.lora, seed=seed)
    return split


def split_tower(tower: Tower) -> SplitTower:
    """Load a pretrained model and split it where `load_tower` does, without LoRA.

    Raises:
        UserError: the model is not there or not understood, or has too few layers.
    """
    return _split(load_model(tower), tower)


def whole_model(tower: Tower, upper: UpperTower) -> PreTrainedModel:
    """The pretrained model in one piece, with the top layers of `upper`, whose LoRA is merged."""
    model = load_model(tower)
    assert isinstance(model, PreTrainedModel)
    layers = _layers_of(model)
    assert layers is not None, "it was split before"
    top = layers[len(layers) - len(upper.layers) :]
    for layer, merged in zip(top, upper.layers, strict=True):
        layer.load_state_dict(merged.state_dict())
    return model


def _split(model: nn.Module, tower: Tower) -> SplitTower:
    config: Any = model.config
    layers = _layers_of(model)
    if layers is None or not hasattr(config, "hidden_size"):
        raise UserError(
            f"tower model {tower.model!r}: {type(model).__name__} keeps its layers in none of "
            f"{', '.join(_LAYERS)}, so it cannot be split; use a BERT-like text or a ViT-like "
            "vision model"
        )
    if tower.layers_in_step > len(layers):
        raise UserError(
            f"tower model {tower.model!r}: trainable_layers={tower.trainable_layers}, but it has "
            f"{len(layers)} layers; lower it"
        )
    if getattr(model, "pooler", None) is not None:
        model.register_module("pooler", None)  # of the first token, for tasks that are not ours
    probe = _probe(tower, config)
    whole_ULH, norm_at = _whole(model, probe)
    cut = len(layers) - tower.layers_in_step
    upper_layers = nn.ModuleList(layers[cut:])
    del layers[cut:]
    norm = None
    if norm_at is not None and tower.layers_in_step:
        norm = _find(model, norm_at)
        parent, _, name = norm_at.rpartition(".")
        setattr(model.get_submodule(parent), name, nn.Identity())
    is_text = isinstance(tower, TextTower)
    split = SplitTower(
        LowerTower(model), UpperTower(upper_layers, norm, config, has_padding=is_text)
    )
    _check_split(split, probe, whole_ULH, tower)
    return split


def _whole(model: nn.Module, probe: Mapping[str, Tensor]) -> tuple[Tensor, str | None]:
    """Tokens of the unsplit model, and the path of the norm that they come out of, if it has one.

    Some norms are those of a pooled token, as CLIP's.
    """
    outputs: dict[str, Tensor] = {}
    hooks = []
    for path in _FINAL_NORMS:
        norm = _find(model, path)
        if norm is not None:
            keep = partial(outputs.__setitem__, path)
            hooks.append(norm.register_forward_hook(lambda _, __, out, keep=keep: keep(out)))
    with torch.no_grad():
        whole_ULH: Tensor = model(**probe).last_hidden_state
    for hook in hooks:
        hook.remove()
    at = next((path for path, out in outputs.items() if torch.equal(out, whole_ULH)), None)
    return whole_ULH, at


def _check_split(
    split: SplitTower, probe: Mapping[str, Tensor], whole_ULH: Tensor, tower: Tower
) -> None:
    """Refuse an architecture whose parts do not compute what the whole does."""
    mask_UL = probe.get("attention_mask", torch.ones(whole_ULH.shape[:2])).bool()
    try:
        with torch.no_grad():
            parts_ULH = split.upper(split.lower(probe).clone(), mask_UL)
        differs = not torch.allclose(
            parts_ULH[mask_UL], whole_ULH[mask_UL], atol=_PROBE_TOLERANCE, rtol=_PROBE_TOLERANCE
        )
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise _not_understood(tower, str(error)) from error
    if differs:
        raise _not_understood(tower, "both halves together compute something else")


def _not_understood(tower: Tower, why: str) -> UserError:
    return UserError(
        f"tower model {tower.model!r}: its upper {tower.layers_in_step} layers do not run apart "
        f"from the rest ({why}); use a BERT-like text or a ViT-like vision model"
    )


def _probe(tower: Tower, config: Any) -> dict[str, Tensor]:
    """Inputs of two items, one of them with padding where there can be some."""
    if isinstance(tower, ImageTower):
        size = tower.image_size
        patch = int(getattr(config, "patch_size", 1))
        if size % patch:
            raise UserError(
                f"image_size={size} is no multiple of the patches of {tower.model!r}, which have "
                f"{patch} pixels; use {size + -size % patch}"
            )
        values = torch.linspace(-1, 1, 2 * 3 * size * size).reshape(2, 3, size, size)
        return {"pixel_values": values}
    longest = getattr(config, "max_position_embeddings", tower.max_tokens)
    if config.model_type in _POSITIONS_BEHIND_PADDING:
        longest -= config.pad_token_id + 1
    if tower.max_tokens > longest:
        raise UserError(
            f"max_tokens={tower.max_tokens}, but {tower.model!r} reads at most {longest}; lower it"
        )
    length = min(4, tower.max_tokens)
    ids = torch.arange(2 * length).reshape(2, length) % config.vocab_size
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[1, -1] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _find(model: nn.Module, path: str) -> nn.Module | None:
    module: Any = model
    for name in path.split("."):
        module = getattr(module, name, None)
    return module if isinstance(module, nn.Module) else None


def _layers_of(model: nn.Module) -> nn.ModuleList | None:
    found = (_find(model, path) for path in _LAYERS)
    return next((part for part in found if isinstance(part, nn.ModuleList) and len(part)), None)


# --- LoRA ----------------------------------------------------------------------------------------


def add_lora(upper: UpperTower, lora: Lora, *, seed: int) -> None:
    """Put trainable low-rank updates beside the target modules, in place.

    Raises:
        UserError: the target modules match nothing; lists what there is.
    """
    linear = [name for name, part in upper.layers.named_modules() if isinstance(part, nn.Linear)]
    targets = lora.target_modules or _query_value(linear)
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            raise UserError(
                f"lora.target_modules: {target!r} matches nothing in the trainable layers; "
                f"candidates are {_candidates(linear)}"
            )
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft declares int and takes any number
        lora_dropout=lora.dropout,
        target_modules=list(targets),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, upper.layers)
    upper.train(upper.training)


def _query_value(linear: list[str]) -> tuple[str, ...]:
    ends = {name.rpartition(".")[2] for name in linear}
    for names in _QUERY_VALUE:
        if ends.issuperset(names):
            return names
    raise UserError(
        "lora.target_modules: this model's query and value projections have no name known here; "
        f"set lora.target_modules to some of {_candidates(linear)}"
    )


def _candidates(linear: list[str]) -> str:
    """Dotted names within a layer, each once."""
    return ", ".join(sorted({name.partition(".")[2] for name in linear}))


def merge_lora(module: nn.Module) -> None:
    """Fold every LoRA update below `module` into the weights it adapts, in place."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer):
                child.merge()
                setattr(parent, name, child.get_base_layer())
