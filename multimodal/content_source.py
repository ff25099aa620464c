"""Content vectors for the ranker's steps: deduplicated, from encoder and bank, learning back.

    rank 0 wants rows 3 5 | rank 1 wants 5 8         distinct over all ranks: 3 5 8
    placement encodes them, each once          -->   the bank of every rank holds what its last
                                                     layer reads of them, and of all other items
    vectors of a batch = last layer of bank    -->   gradient of the last layer, from all items;
                                                     of rows 3 5 8 it goes on to the placement

So a step costs what its distinct items with gradient cost, whatever the number of ranks, samples
and events, and every rank reads the same vectors as one process with all the rows would.
"""

# Shapes: U distinct items of this rank's batch, G items encoded in a step by all ranks together,
# R rows of the store, H width of the fused vectors, D content dim.

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from embedding.batch import RankingBatch
from embedding.errors import UserError
from embedding.items import ContentVectors, ItemRows
from multimodal.content_bank import ContentBank
from multimodal.content_config import ContentConfig, Service
from multimodal.content_head import ContentHead
from multimodal.gradient_items import own_rows
from multimodal.rank_group import RankGroup
from multimodal.stopwatch import Stopwatch

_BANK = "bank/"
_IDENTITY = ("item_ids", "tokens", "models")
"""What tells whose bank it is; its vectors may be of millions of items."""
_MOMENTS = "encoder/output.deviation_H"
"""The moments of the last layer's inputs, in a checkpoint."""


class EncoderPlacement(Protocol):
    """Where towers and fusion run. Every rank makes the same calls with the same rows.

    Vectors are fused ones: what the last layer of the encoder reads.
    """

    def head(self) -> dict[str, Tensor]:
        """State of the last layer, a `StandardisedLinear`, as training starts; on all ranks."""
        ...

    def request(self, step: int, rows_G: Tensor) -> None:
        """Begin to encode the rows of a step."""

    def vectors(self, step: int) -> Tensor:
        """What was requested, (G, H), without gradient; equal on all ranks."""
        ...

    def learn(self, step: int, gradient_GH: Tensor, rate_factor: float) -> None:
        """Update from this rank's gradient of a step's vectors; the ranks' are averaged."""

    def encode_all(self, num_rows: int, *, exact: bool) -> Tensor:
        """Vectors of all rows with the present weights, (R, H); equal on all ranks.

        Args:
            num_rows: R.
            exact: in fp32; else in the precision of training steps.
        """
        ...

    def state(self) -> dict[str, Tensor]:
        """All that training changes but the last layer; on rank 0, elsewhere it may be empty."""
        ...

    def load(self, tensors: Mapping[str, Tensor], *, wakes: bool = False) -> None:
        """Go on from a checkpoint of the whole encoder.

        Args:
            tensors: the checkpoint's.
            wakes: inputs of the last layer that were constant when the checkpoint's moments were
                computed keep those of now, as `ContentHead.warm_start` has it.
        """

    def gradient_norms(self) -> dict[str, float]:
        """Norm of the last step's gradient by part of the encoder; on rank 0."""
        ...

    def close(self, *, is_orderly: bool) -> None:
        """Let go of what lives outside this process.

        Args:
            is_orderly: all ranks call it. False: this rank has failed, and waits for nobody.
        """


class TrainedContent:
    """The `ranking.content.ContentSource` of a training or predicting rank."""

    def __init__(
        self,
        config: ContentConfig,
        placement: EncoderPlacement,
        *,
        head: ContentHead,
        bank: ContentBank,
        ranks: RankGroup,
    ) -> None:
        """Content that no step has been trained on.

        Args:
            config: the recipe's.
            placement: of towers and fusion.
            head: the last layer of this rank, as the placement's starts.
            bank: an empty one, of all rows of the content store.
            ranks: all training ranks.
        """
        self.config = config
        self.placement = placement
        self.head = head
        self.bank = bank
        self.step = 0
        """Number of the next training step."""
        self._ranks = ranks
        placed = config.placement
        self._encodes = not config.frozen
        """Whether steps train more than the head; else the bank is filled once."""
        self._is_ahead = isinstance(placed, Service) and placed.staleness == 1
        self._upcoming: deque[ItemRows] = deque()
        self._requested: dict[int, Tensor] = {}
        self._current: _Step | None = None
        self._is_fresh = False
        self._meter = _Meter()
        self._stopwatch = Stopwatch(bank.device)

    def ahead(self, batches: Iterator[RankingBatch]) -> Iterator[RankingBatch]:
        """The same batches; with staleness 1 one more is taken from the loader than handed out."""
        self._upcoming.clear()
        return self._announced(batches) if self._is_ahead else batches

    def train(self, items: ItemRows) -> ContentVectors:
        """Vectors for a training step; their gradients count, see `learn`."""
        with self._stopwatch.running():
            return self._train(items)

    def learn(self, rate_factor: float) -> None:
        """Update the encoder from the gradient of the vectors that `train` gave last.

        The last layer learns from all of them, towers and fusion from those encoded in the step.
        """
        with self._stopwatch.running():
            self._learn(rate_factor)

    def refresh(self) -> None:
        """Encode every item of the store with the present weights, for what is published."""
        if not self._is_fresh:
            self._fill_bank(exact=True)
            self._is_fresh = True

    def read(self, items: ItemRows) -> ContentVectors:
        """Vectors with the present last layer, of what was fused at the last `refresh`."""
        with torch.no_grad():
            return _content(self.head.vectors(self.bank.read(items.rows_U[1:])), items)

    def metrics(self) -> dict[str, float]:
        """Figures since the last call, of this rank."""
        norms = {}
        if self._ranks.rank == 0:
            norms = {**self.placement.gradient_norms(), "heads": self.head.gradient_norm()}
        meter, self._meter = self._meter, _Meter()
        seconds = self._stopwatch.take() / max(meter.steps, 1)
        return (
            meter.values()
            | {"content/seconds_per_step": seconds}
            | {f"content/gradient_norm_{part}": norm for part, norm in norms.items()}
        )

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds; on rank 0, the others give nothing."""
        state = self.placement.state()
        if self._ranks.rank != 0:
            return {}
        bank = {f"{_BANK}{name}": value for name, value in self.bank.state().items()}
        return (
            state
            | self.head.state()
            | bank
            | {"step": torch.tensor([self.step, int(self._is_fresh)])}
        )

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint of this run."""
        learned = _without_bank(tensors)
        self.placement.load(learned)
        self.head.load(learned)
        self.bank.load(_of_bank(tensors, self.bank.state()))
        self.step, is_fresh = tensors["step"].tolist()
        self._is_fresh = bool(is_fresh)

    def warm_start(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Start from the encoder of another run.

        Returns:
            What keeps its start values, and why.
        """
        self._is_fresh = False
        if not tensors:
            return {"encoder": "not in the checkpoint"}
        learned = _without_bank(tensors)
        _, is_fresh = learned.pop("step").tolist()
        identity = _of_bank(tensors, _IDENTITY)
        obstacle = self.bank.other_models(identity)
        if obstacle is not None:
            # LoRA, fusion and standardisation are fitted to what their towers give.
            return {"encoder": obstacle, "bank": "encoded anew"}
        try:
            self.placement.load(learned, wakes=True)
        except UserError as error:
            return {"encoder": str(error), "bank": "encoded anew"}
        num_woken = self.head.warm_start(learned)
        if not num_woken and is_fresh and self.bank.has_tokens_of(identity):
            self.bank.fill(tensors[f"{_BANK}fused"], self.step)
            self._is_fresh = True
            return {}
        kept = {"bank": "encoded anew with the weights that were carried"}
        if num_woken:
            what = (
                f"{num_woken} of {self.head.width} columns were constant until now and vary today"
            )
            kept[_MOMENTS] = f"{what}: they take mean and deviation of today's items"
        return kept

    def close(self, *, is_orderly: bool = True) -> None:
        """End what the placement holds outside this process; see `EncoderPlacement.close`."""
        self.placement.close(is_orderly=is_orderly)
        self._ranks.close(is_orderly=is_orderly)

    def _train(self, items: ItemRows) -> ContentVectors:
        every = self.config.gradient.refresh_every_steps if self._encodes else None
        is_due = self.step == 0 or (every is not None and self.step % every == 0)
        if is_due and not self._is_fresh:
            # What is frozen is encoded once: as exactly as what is published.
            self._fill_bank(exact=not self._encodes)
            self._is_fresh = not self._encodes
        rows_G = self._encode(items) if self._encodes else None
        fused_UH = self.bank.read(items.rows_U[1:]).requires_grad_(self._encodes)
        vectors_UD = self.head.vectors(fused_UH)
        content = _content(vectors_UD.detach(), items)
        content.vectors_UD.requires_grad_()
        self._current = _Step(content, vectors_UD, fused_UH, rows_G)
        self._meter.num_read += len(vectors_UD)
        if self._encodes:
            self._meter.add_ages(self.bank.ages(items.rows_U[1:], self.step))
        return content

    def _encode(self, items: ItemRows) -> Tensor:
        """Have this step's items encoded into the bank; their rows (G,)."""
        if self._upcoming:
            self._upcoming.popleft()  # this step's
        if self.step not in self._requested:
            self._request(self.step, items)
        rows_G = self._requested.pop(self.step)
        computed_at = self.step - 1 if self._is_ahead else self.step
        fused_GH = self.placement.vectors(self.step)
        self._meter.encoded += len(rows_G)
        self._compare(self._ranks.share(rows_G), self._ranks.share(fused_GH))
        self.bank.write(rows_G, fused_GH, max(computed_at, 0))
        if self._upcoming:
            self._request(self.step + 1, self._upcoming[0])
        return rows_G

    @torch.no_grad()
    def _compare(self, rows: Tensor, fused: Tensor) -> None:
        """Of this rank's share of the encoded items: what encoding them anew has changed."""
        before, now = (self.head.vectors(each) for each in (self.bank.read(rows), fused))
        self._meter.add_cosines(cosine_similarity(before, now, dim=1))

    def _learn(self, rate_factor: float) -> None:
        assert self._current is not None
        step, self._current = self._current, None
        gradient_UD = step.content.vectors_UD.grad
        assert gradient_UD is not None, "the loss does not depend on content"
        self.head.learn(step.vectors_UD, gradient_UD[1:], rate_factor)
        if step.rows_G is not None:
            gradient_GH = step.fused_gradient(step.rows_G)
            self.placement.learn(self.step, gradient_GH, rate_factor)
            self._is_fresh = False
        self.step += 1
        self._meter.steps += 1

    def _request(self, step: int, items: ItemRows) -> None:
        generator = torch.Generator()
        mixed = np.random.SeedSequence([self.config.seed, step, self._ranks.rank]).generate_state(1)
        generator.manual_seed(int(mixed[0]))
        policy = self.config.gradient
        # A batch that is announced ahead still lies on the CPU.
        rows = own_rows(items, policy, generator).to(self.bank.device)
        rows_G = self._ranks.distinct(rows, policy.max_items_per_step)
        self._requested[step] = rows_G
        self.placement.request(step, rows_G)

    def _fill_bank(self, *, exact: bool) -> None:
        self.bank.fill(self.placement.encode_all(self.bank.num_rows, exact=exact), self.step)

    def _announced(self, batches: Iterator[RankingBatch]) -> Iterator[RankingBatch]:
        """Each batch when the next one is known, too."""
        waiting: RankingBatch | None = None
        for batch in batches:
            assert batch.content is not None
            self._upcoming.append(batch.content)
            if waiting is not None:
                yield waiting
            waiting = batch
        if waiting is not None:
            yield waiting


@dataclass(frozen=True)
class _Step:
    """A training step between `train` and `learn`."""

    content: ContentVectors
    """What the ranker reads, with its gradient."""
    vectors_UD: Tensor
    """The same, with the graph of the last layer."""
    fused_UH: Tensor
    """What it was computed from."""
    rows_G: Tensor | None
    """Ascending store rows that were encoded; None where nothing but the last layer trains."""

    def fused_gradient(self, rows_G: Tensor) -> Tensor:
        """Gradient (G, H) of the encoded rows; 0 for those that only other ranks read."""
        gradient_UH = self.fused_UH.grad
        assert gradient_UH is not None
        gradient_GH = gradient_UH.new_zeros(len(rows_G), gradient_UH.shape[1])
        if len(rows_G):
            rows_U = self.content.items.rows_U[1:]
            places_U = torch.searchsorted(rows_G, rows_U).clamp_(max=len(rows_G) - 1)
            is_encoded_U = rows_G[places_U] == rows_U
            gradient_GH[places_U[is_encoded_U]] = gradient_UH[is_encoded_U]
        return gradient_GH


def _content(vectors_UD: Tensor, items: ItemRows) -> ContentVectors:
    """With the zeros that stand for no item."""
    nothing_1D = vectors_UD.new_zeros(1, vectors_UD.shape[1])
    return ContentVectors(torch.cat([nothing_1D, vectors_UD]), items)


def _of_bank(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    return {name: tensors[_BANK + name] for name in names if _BANK + name in tensors}


def _without_bank(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensors[name] for name in tensors if not name.startswith(_BANK)}


class _Meter:
    """Sums of one window of steps."""

    def __init__(self) -> None:
        self.steps = 0
        self.encoded = 0
        self.num_read = 0
        self.num_compared = 0
        self.age_sum: Tensor | None = None
        self.cosine_sum: Tensor | float = 0.0

    def add_cosines(self, cosines: Tensor) -> None:
        """Of items before and after they are encoded; nothing here waits for the device."""
        self.num_compared += len(cosines)
        self.cosine_sum = self.cosine_sum + cosines.sum()

    def add_ages(self, ages_U: Tensor) -> None:
        """Of the vectors that a step reads."""
        self.age_sum = ages_U.sum() + (0 if self.age_sum is None else self.age_sum)

    def values(self) -> dict[str, float]:
        """Means over the steps; without what there was nothing of."""
        steps = max(self.steps, 1)
        values = {
            "content/encoded_items": self.encoded / steps,
            "content/distinct_items_per_rank": self.num_read / steps,
        }
        if self.age_sum is not None:
            values["content/bank_age_steps"] = float(self.age_sum) / max(self.num_read, 1)
        if self.num_compared:
            values["content/bank_cosine"] = float(self.cosine_sum) / self.num_compared
        return values
