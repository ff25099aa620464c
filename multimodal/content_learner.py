"""One replica of the content encoder with its optimizer: rows in, vectors out, gradients back."""

# Shapes: U items, D content dim, P elements of all trained parameters.

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from embedding.errors import UserError
from embedding.precision import check_precision
from multimodal.content_config import ContentConfig
from multimodal.content_encoder import (
    ContentEncoder,
    ReadTokens,
    load_trained_state,
    trained_state,
)

_LORA = "lora_"
_PARTS = {"towers": "tower", "fusion": "fusion"}
"""Attributes of the encoder as the report calls them; whatever else there is, is a head."""


class ContentLearner:
    """Encodes items, and trains the encoder from the gradient of their vectors.

    Replicas that see the same gradients in the same order stay equal: initial weights come from the
    config's seed, and so does dropout, with the step.
    """

    def __init__(
        self,
        config: ContentConfig,
        encoder: ContentEncoder,
        read_tokens: ReadTokens,
        device: torch.device,
        *,
        num_rows: int,
    ) -> None:
        """`num_rows`: of the token store."""
        check_precision(config.precision, device, "content.precision")
        self.config = config
        self.encoder = encoder.to(device)
        self.device = device
        self._read_tokens = read_tokens
        self._fused = _FusedRows(num_rows) if config.frozen else None
        self._trained = {n: p for n, p in encoder.named_parameters() if p.requires_grad}
        rates = config.optimizer
        lora = [p for n, p in self._trained.items() if _LORA in n]
        rest = [p for n, p in self._trained.items() if _LORA not in n]
        groups = [
            {"params": part, "lr": rate, "initial_lr": rate}
            for part, rate in ((lora, rates.lora_learning_rate), (rest, rates.learning_rate))
            if part
        ]
        self.optimizer = torch.optim.AdamW(
            groups, weight_decay=rates.weight_decay, fused=device.type in ("cpu", "cuda")
        )
        self._graphs: dict[int, Tensor] = {}
        """Vectors with their graph, by step."""

    @torch.no_grad()
    def encode(self, rows_U: Tensor, items_at_a_time: int = 256, *, exact: bool = True) -> Tensor:
        """Vectors (U, D) with the present weights, without dropout.

        Args:
            rows_U: the items.
            items_at_a_time: bounds memory.
            exact: in fp32; else in the precision of training steps.
        """
        self.encoder.eval()
        empty_0D = torch.empty(0, self.config.dim, device=self.device)
        with nullcontext() if exact else self._autocast():
            parts = [self._encoded(part) for part in rows_U.split(items_at_a_time) if len(part)]
        return torch.cat([empty_0D, *(part.float() for part in parts)])

    def moments(self, rows_N: Tensor) -> Tensor:
        """What `standardise` needs of some rows; moments of parts add up."""
        return self.encoder.moments(self._read_tokens, rows_N.cpu())

    def standardise(self, moments_3H: Tensor) -> None:
        """Standardise before training what the last layer reads; a `load` replaces it."""
        self.encoder.standardise(moments_3H)
        self._forget_fused()

    def start(self, step: int, rows_U: Tensor, *, keep_graph: bool) -> Tensor:
        """Vectors (U, D) for a training step, detached.

        Args:
            step: their number; seeds dropout.
            rows_U: the items.
            keep_graph: for a `finish` before the weights change; else `finish` encodes again, with
                the weights of that time.
        """
        with torch.set_grad_enabled(keep_graph):
            vectors_UD = self._encoded_for_training(step, rows_U)
        if keep_graph:
            self._graphs[step] = vectors_UD
        return vectors_UD.detach()

    def finish(self, step: int, rows_U: Tensor, gradient_UD: Tensor) -> None:
        """Gradients of all parameters from those of a step's vectors; they replace the last."""
        self.optimizer.zero_grad(set_to_none=False)
        vectors_UD = self._graphs.pop(step, None)
        if len(rows_U):
            if vectors_UD is None:
                vectors_UD = self._encoded_for_training(step, rows_U)
            vectors_UD.backward(gradient_UD.to(self.device))

    def gradient(self) -> Tensor:
        """All gradients in one vector, (P,)."""
        parts = [
            (torch.zeros_like(p) if p.grad is None else p.grad).flatten()
            for p in self._trained.values()
        ]
        return torch.cat(parts)

    def update(self, gradient_P: Tensor, rate_factor: float) -> None:
        """Step with these gradients and a factor on the learning rates."""
        sizes = [p.numel() for p in self._trained.values()]
        for parameter, part in zip(self._trained.values(), gradient_P.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate_factor
        self.optimizer.step()

    def gradient_norms(self) -> dict[str, float]:
        """Norm of the last gradient, by part of the encoder."""
        squares: dict[str, float] = {}
        for name, parameter in self._trained.items():
            part = _PARTS.get(name.split(".")[0], "heads")
            gradient = parameter.grad
            square = 0.0 if gradient is None else float(gradient.square().sum())
            squares[part] = squares.get(part, 0.0) + square
        return {part: square**0.5 for part, square in squares.items()}

    def state(self) -> dict[str, Tensor]:
        """What training changes, and the optimizer's state."""
        tensors = {f"encoder/{n}": value for n, value in trained_state(self.encoder).items()}
        for name, parameter in self._trained.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{name}/{key}"] = value
        return tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a `state`; one without optimizer state starts it anew.

        Raises:
            UserError: it is another encoder's.
        """
        weights = _below("encoder/", tensors)
        if not weights:
            raise UserError(
                "the checkpoint holds no content encoder: it was written without content; set "
                "content to null, or start a new run"
            )
        load_trained_state(self.encoder, weights)
        self._forget_fused()
        for name, parameter in self._trained.items():
            saved: dict[str, Any] = _below(f"optimizer/{name}/", tensors)
            if saved:
                # A scalar was saved as one element.
                self.optimizer.state[parameter] = {
                    key: (value.reshape(()) if key == "step" else value).to(self.device, copy=True)
                    for key, value in saved.items()
                }

    def _encoded_for_training(self, step: int, rows_U: Tensor) -> Tensor:
        self.encoder.train()
        if not len(rows_U):
            return torch.zeros(0, self.config.dim, device=self.device)
        with torch.random.fork_rng(devices=_generators(self.device)), self._autocast():
            torch.manual_seed(self.config.seed * 1_000_003 + step)
            return self._encoded(rows_U).float()

    def _encoded(self, rows_U: Tensor) -> Tensor:
        vectors_UD: Tensor
        if self._fused is None:
            vectors_UD = self.encoder(self._read_tokens(rows_U.cpu()))
        else:
            vectors_UD = self.encoder.output(self._fused.read(rows_U.cpu(), self._fuse))
        return vectors_UD

    @torch.no_grad()
    def _fuse(self, rows_U: Tensor) -> Tensor:
        self.encoder.eval()
        with torch.autocast(self.device.type, enabled=False):
            return self.encoder.fused(self._read_tokens(rows_U).to(self.device))

    def _forget_fused(self) -> None:
        """What stands for an absent modality has changed."""
        if self._fused is not None:
            self._fused.forget()

    def _autocast(self) -> torch.autocast:
        reduced = self.config.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=reduced)


class _FusedRows:
    """What the last layer reads, of every row seen so far: computed once where only that trains."""

    # Shapes: R rows, H width of the fused tokens.

    def __init__(self, num_rows: int, items_at_a_time: int = 256) -> None:
        self._is_known_R = torch.zeros(num_rows, dtype=torch.bool)
        self._fused_RH: Tensor | None = None
        self._items_at_a_time = items_at_a_time

    def read(self, rows_U: Tensor, fuse: Callable[[Tensor], Tensor]) -> Tensor:
        """(U, H), on the device of `fuse`."""
        unknown = rows_U[~self._is_known_R[rows_U]]
        for part in unknown.split(self._items_at_a_time):
            fused_UH = fuse(part)
            if self._fused_RH is None:
                self._fused_RH = fused_UH.new_empty(len(self._is_known_R), fused_UH.shape[1])
            self._fused_RH[part.to(fused_UH.device)] = fused_UH
            self._is_known_R[part] = True
        assert self._fused_RH is not None, "no rows"
        return self._fused_RH[rows_U.to(self._fused_RH.device)]

    def forget(self) -> None:
        """Compute anew from here."""
        self._is_known_R.fill_(False)


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _generators(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
