"""One replica of the content encoder and its optimizer: rows in, fused vectors out, gradients back.

Its last layer is trained on the ranks, by all items that they read (`multimodal.content_head`).
"""

# Shapes: U items, H width of the fused vectors, P elements of all trained parameters.

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from embedding.errors import UserError
from embedding.precision import check_precision, exact_products
from multimodal.content_config import ContentConfig
from multimodal.content_encoder import (
    ContentEncoder,
    ReadTokens,
    load_trained_state,
    trained_state,
)
from multimodal.trained_parameters import TrainedParameters

_HEAD = "output."
_LORA = "lora_"
_PARTS = {"towers": "tower", "fusion": "fusion"}
"""Attributes of the encoder as the report calls them."""


class ContentLearner:
    """Encodes items, and trains towers and fusion from the gradient of the fused vectors.

    Replicas that see the same gradients in the same order stay equal: initial weights come from the
    config's seed, and so does dropout, with the step.
    """

    def __init__(
        self,
        config: ContentConfig,
        encoder: ContentEncoder,
        read_tokens: ReadTokens,
        device: torch.device,
    ) -> None:
        check_precision(config.precision, device, "content.precision")
        self.config = config
        self.encoder = encoder.to(device)
        self.device = device
        self._read_tokens = read_tokens
        rates = config.optimizer
        self._trained = TrainedParameters(
            {
                n: p
                for n, p in encoder.named_parameters()
                if p.requires_grad and not n.startswith(_HEAD)
            },
            lambda name: rates.lora_learning_rate if _LORA in name else rates.learning_rate,
            rates,
            device,
        )
        self._graphs: dict[int, Tensor] = {}
        """Fused vectors with their graph, by step."""

    @property
    def width(self) -> int:
        """H."""
        return self.encoder.output.in_features

    def head(self) -> dict[str, Tensor]:
        """State of the last layer, a `StandardisedLinear`, as training starts."""
        return self.encoder.output.state_dict()

    @torch.no_grad()
    def encode(self, rows_U: Tensor, items_at_a_time: int = 256, *, exact: bool = True) -> Tensor:
        """Fused vectors (U, H) with the present weights, without dropout.

        Args:
            rows_U: the items.
            items_at_a_time: bounds memory.
            exact: in fp32, without TF32; else in the precision of training steps.
        """
        self.encoder.eval()
        empty_0H = torch.empty(0, self.width, device=self.device)
        with exact_products() if exact else self._autocast():
            parts = [self._fused(part) for part in rows_U.split(items_at_a_time) if len(part)]
        return torch.cat([empty_0H, *(part.float() for part in parts)])

    def moments(self, rows_N: Tensor) -> Tensor:
        """What `standardise` needs of some rows; moments of parts add up."""
        return self.encoder.moments(self._read_tokens, rows_N.cpu())

    def standardise(self, moments_3H: Tensor) -> None:
        """Standardise before training what the last layer reads; a `load` replaces it."""
        self.encoder.standardise(moments_3H)

    def start(self, step: int, rows_U: Tensor, *, keep_graph: bool) -> Tensor:
        """Fused vectors (U, H) for a training step, detached.

        Args:
            step: their number; seeds dropout, with the first item.
            rows_U: the items.
            keep_graph: for a `finish` before the weights change; else `finish` encodes again, with
                the weights of that time.
        """
        with torch.set_grad_enabled(keep_graph):
            fused_UH = self._fused_for_training(step, rows_U)
        if keep_graph:
            self._graphs[step] = fused_UH
        return fused_UH.detach()

    def finish(self, step: int, rows_U: Tensor, gradient_UH: Tensor) -> None:
        """Gradients of all parameters from those of a step's vectors; they replace the last."""
        self._trained.clear_gradient()
        fused_UH = self._graphs.pop(step, None)
        if len(rows_U):
            if fused_UH is None:
                fused_UH = self._fused_for_training(step, rows_U)
            fused_UH.backward(gradient_UH.to(self.device))

    def gradient(self) -> Tensor:
        """All gradients in one vector, (P,)."""
        return self._trained.gradient()

    def update(self, gradient_P: Tensor, rate_factor: float) -> None:
        """Step with these gradients and a factor on the learning rates."""
        self._trained.update(gradient_P, rate_factor)

    def gradient_norms(self) -> dict[str, float]:
        """Norm of the last gradient, by part of the encoder."""
        return self._trained.gradient_norms(lambda name: _PARTS[name.split(".")[0]])

    def state(self) -> dict[str, Tensor]:
        """What training changes but for the last layer, and the optimizer's state."""
        weights = {
            f"encoder/{name}": value
            for name, value in trained_state(self.encoder).items()
            if not name.startswith(_HEAD)
        }
        return weights | self._trained.optimizer_state()

    def load(self, tensors: Mapping[str, Tensor], *, wakes: bool = False) -> None:
        """Go on from the checkpoint of a whole encoder; one without optimizer starts it anew.

        Args:
            tensors: the checkpoint's.
            wakes: keep the moments of now of those inputs of the last layer that were constant
                when the checkpoint's were computed.

        Raises:
            UserError: it is another encoder's.
        """
        weights = {
            name.removeprefix("encoder/"): value
            for name, value in tensors.items()
            if name.startswith("encoder/")
        }
        if not weights:
            raise UserError(
                "the checkpoint holds no content encoder: it was written without content; set "
                "content to null, or start a new run"
            )
        now = {name: moment.clone() for name, moment in self.encoder.output.named_buffers()}
        load_trained_state(self.encoder, weights)
        if wakes:
            self.encoder.wake(**now)
        self._trained.load_optimizer_state(tensors)

    def _fused_for_training(self, step: int, rows_U: Tensor) -> Tensor:
        self.encoder.train()
        if not len(rows_U):
            return torch.zeros(0, self.width, device=self.device)
        # A share of a step is known by its first item, wherever it is encoded.
        mixed = np.random.SeedSequence([self.config.seed, step, int(rows_U[0])])
        with torch.random.fork_rng(devices=_generators(self.device)), self._autocast():
            torch.manual_seed(int(mixed.generate_state(1, np.uint64)[0]) >> 1)
            return self._fused(rows_U).float()

    def _fused(self, rows_U: Tensor) -> Tensor:
        return self.encoder.fused(self._read_tokens(rows_U.cpu()))

    def _autocast(self) -> torch.autocast:
        reduced = self.config.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=reduced)


def _generators(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
