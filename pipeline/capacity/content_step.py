"""What content adds to a step of a cluster: seconds of ranks and actors, bytes of every rank.

The last layer of the encoder is the ranks': each applies it to all items that its batch reads.
Inline, a step of every rank also encodes its share of the items, gathers the fused vectors of all,
adds up their gradients, goes backward and adds up the gradients of the encoder; nothing of it runs
beside anything else. With a service, actors do that, each for its share, on devices of their own:

    staleness 0    step = ranks + actor
    staleness 1    step = max(ranks, actor); backward encodes again, as the weights have moved on

Vectors and gradients are messages that each rank and each actor exchange, or, in the direct
transport, collectives: an actor's vectors leave it once, for all ranks together.
"""

from dataclasses import dataclass, replace
from math import ceil, floor

from embedding.limits import ELEMENT_BYTES
from embedding.planning.cluster_shape import ClusterShape
from embedding.planning.cost_constants import CORE_BANDWIDTH, CPU_CALL_S, GPU_CALL_S, GPU_EXCHANGE_S
from multimodal.content_config import ContentConfig, Service
from multimodal.content_cost import EncoderCost
from pipeline.capacity.item_load import StepItems, step_items
from pipeline.capacity.step import all_gather_seconds, all_reduce_seconds, gpu_seconds
from pipeline.capacity.types import ContentCost

_OPERATION_S = GPU_CALL_S / 10
"""Python and PyTorch start one kernel: where items are few, the GPU waits for that."""
_RAY_CALL_S = 0.25e-3
"""Ray's own microbenchmarks have an asyncio actor answer about four thousand calls a second."""
_TOKEN_COPIES = 2
"""Stored tokens are gathered from a mapped file, and padded, by one core."""
_ID_BYTES = 8
_STATES_PER_VALUE = 4
"""Two gradients of every trained value, its own and the sum over ranks, and two moments of Adam."""
_VECTORS_PER_ITEM = 4
"""Copies of a read vector: of the last layer, with the one for no content, its gradient, and
normalised."""
_HEAD_STATES = 1 + _STATES_PER_VALUE
"""Values of the last layer, and what training holds of each."""
_FUSED_PER_ITEM = 3
"""Copies of what the last layer reads: from the bank, standardised, its gradient."""
_PASSES = 3
"""Products of the last layer in a step: forward, and two gradients (one where all before it is
frozen)."""


@dataclass(frozen=True)
class ContentStep:
    """The content part of one step."""

    items: StepItems
    rank_s: float
    """On every rank, beside tables and dense side."""
    actor_s: float
    """On every actor of the service; 0 where the ranks encode."""
    waits_for_actors: bool
    """Whether ranks and actors work one after the other."""
    rank_bytes: float
    """On every rank: bank, encoder, and what a step holds of them."""
    copy_bytes: float
    """Of what a checkpoint is written from: the bank, and what is trained with its moments."""

    def added_seconds(self, other_s: float) -> float:
        """What content adds to a step that takes a rank `other_s` without it."""
        if self.waits_for_actors:
            return self.rank_s + self.actor_s
        return max(other_s + self.rank_s, self.actor_s) - other_s


def content_step(
    cost: ContentCost,
    config: ContentConfig,
    shape: ClusterShape,
    batch_size_per_rank: int,
    growth: float = 1.0,
) -> ContentStep:
    """The content part of a step on a cluster.

    Args:
        cost: of the recipe's content.
        config: the recipe's content.
        shape: the cluster of the ranks.
        batch_size_per_rank: rows.
        growth: factor of the number of items.
    """
    items = step_items(cost.items, config.gradient, batch_size_per_rank, shape.world_size, growth)
    if config.frozen:  # the bank is filled once
        items = replace(items, encoded=0.0)
    point = _Point(cost, config, shape, items, growth)
    placement = config.placement
    every_rank_s = point.loss_s() + point.head_s()
    if config.frozen:
        held = point.encoder_bytes()
        return ContentStep(
            items=items,
            rank_s=every_rank_s,
            actor_s=0.0,
            waits_for_actors=False,
            rank_bytes=point.bank_bytes() + held + max(point.batch_bytes(), point.refresh_bytes()),
            copy_bytes=point.copy_bytes(),
        )
    if isinstance(placement, Service):
        return ContentStep(
            items=items,
            rank_s=every_rank_s + point.items_s() + point.ray_s(placement),
            actor_s=point.actor_s(placement),
            waits_for_actors=placement.staleness == 0,
            rank_bytes=point.bank_bytes() + max(point.batch_bytes(), point.refresh_bytes()),
            copy_bytes=point.copy_bytes(),
        )
    share = ceil(items.encoded / shape.world_size)
    return ContentStep(
        items=items,
        rank_s=every_rank_s + point.items_s() + point.ranks_s() + point.encoder_s(share),
        actor_s=0.0,
        waits_for_actors=True,
        rank_bytes=point.bank_bytes()
        + point.encoder_bytes()
        + max(point.batch_bytes() + point.encoding_bytes(share), point.refresh_bytes()),
        copy_bytes=point.copy_bytes(),
    )


@dataclass(frozen=True)
class _Point:
    """One cluster with one batch size."""

    cost: ContentCost
    config: ContentConfig
    shape: ClusterShape
    items: StepItems
    growth: float

    @property
    def on_gpu(self) -> bool:
        return self.shape.machine.device == "cuda"

    @property
    def vector_bytes(self) -> int:
        return self.config.dim * ELEMENT_BYTES

    @property
    def fused_bytes(self) -> int:
        return self.cost.encoder.fused_width * ELEMENT_BYTES

    @property
    def head_bytes(self) -> int:
        return self.cost.encoder.fused_width * self.config.dim * ELEMENT_BYTES

    # --- seconds -----------------------------------------------------------------------------

    def encoder_s(self, num_items: int, *, twice: bool = False) -> float:
        """Forward and backward of so many items on a rank; `twice`: forward once more before."""
        flops, operations, core_s = _encoding(self.cost.encoder, self.config, num_items, twice)
        read_s = self._read_s(num_items, twice=twice)
        if self.on_gpu:
            return read_s + self._gpu_s(flops, operations, self.config.precision)
        return (read_s + core_s) * self.shape.ranks_per_core

    def head_s(self) -> float:
        """The last layer, of all items that the rank reads, and its gradients added up."""
        encoder = self.cost.encoder
        added_up = self._collective_s() + all_reduce_seconds(self.head_bytes, self.shape)
        if self.on_gpu:
            flops = _PASSES * 2 * self.items.read * encoder.fused_width * self.config.dim
            return added_up + self._gpu_s(flops, _PASSES, "fp32")
        return added_up + self.items.read * encoder.head_s * self.shape.ranks_per_core

    def loss_s(self) -> float:
        """The contrastive loss of the rank's candidates."""
        cic = self.cost.cic
        if cic is None:
            return 0.0
        flops = cic.flops(self.items.candidates)
        if self.on_gpu:
            return self._gpu_s(flops, cic.operations, "fp32")
        return flops * cic.cpu_s_per_flop * self.shape.ranks_per_core

    def items_s(self) -> float:
        """The ranks tell each other which items they want."""
        bound = self.config.gradient.max_items_per_step or self.items.read
        return self._collective_s() + all_gather_seconds(
            self.shape.world_size * bound * _ID_BYTES, self.shape
        )

    def ranks_s(self) -> float:
        """Vectors to all ranks, their gradients and those of the encoder added up."""
        vectors = self.items.encoded * self.fused_bytes
        values = self.cost.encoder.parameters * ELEMENT_BYTES
        return (
            3 * self._collective_s()
            + all_gather_seconds(vectors, self.shape)
            + all_reduce_seconds(vectors + values, self.shape)
        )

    def ray_s(self, service: Service) -> float:
        """A rank's calls of the actors, with vectors coming and gradients going."""
        moved = 2 * self.items.encoded * self.fused_bytes
        if self._is_direct(service):
            # Rank 0 calls for all ranks, and they wait for it.
            each = 3 * _RAY_CALL_S + 2 * self._exchange_s()
            return service.num_actors * each + moved / self._direct_bandwidth()
        return 2 * service.num_actors * _RAY_CALL_S + moved / self._message_bandwidth()

    def actor_s(self, service: Service) -> float:
        """An actor's share of the items: encoded once for all ranks, whose gradients it adds up."""
        share = ceil(self.items.encoded / service.num_actors)
        twice = service.staleness == 1
        calls = self._actor_calls_s(service, share)
        if service.gpus_per_actor:
            # The same kind of GPU as the ranks'; several actors on one take turns.
            return calls + self.encoder_s(share, twice=twice) / min(service.gpus_per_actor, 1.0)
        _, _, core_s = _encoding(self.cost.encoder, self.config, share, twice)
        threads = max(floor(service.cpus_per_actor), 1)
        return calls + self._read_s(share, twice=twice) + core_s / threads

    def _actor_calls_s(self, service: Service, share: int) -> float:
        """What an actor is told, sends and receives."""
        vectors = share * self.fused_bytes
        values = self.cost.encoder.parameters * ELEMENT_BYTES
        if self._is_direct(service):
            others = service.num_actors - 1
            moved = 2 * vectors + 2 * others / service.num_actors * values
            collectives = (3 if others else 2) * self._exchange_s()
            return 3 * _RAY_CALL_S + collectives + moved / self._direct_bandwidth()
        moved = 2 * self.shape.world_size * vectors + service.num_actors * values
        return 2 * self.shape.world_size * _RAY_CALL_S + moved / self._message_bandwidth()

    def _gpu_s(self, flops: float, operations: int, precision: str) -> float:
        """Never faster than kernels are started."""
        return max(gpu_seconds(flops, self.shape, precision), operations * _OPERATION_S)

    def _read_s(self, num_items: int, *, twice: bool) -> float:
        """Tokens come from the store once for forward and backward, to a GPU for every forward."""
        num_bytes = num_items * self.cost.encoder.token_bytes
        from_store = _TOKEN_COPIES * num_bytes / CORE_BANDWIDTH
        over_pcie = num_bytes / self.shape.machine.pcie_bandwidth if self.on_gpu else 0.0
        forwards = _forwards(_pieces(self.config, num_items))
        return (1 + twice) * from_store + (forwards + twice) * over_pcie

    def _collective_s(self) -> float:
        return 0.0 if self.shape.world_size == 1 else self._exchange_s()

    def _exchange_s(self) -> float:
        return GPU_EXCHANGE_S if self.on_gpu else CPU_CALL_S

    def _is_direct(self, service: Service) -> bool:
        return service.is_direct(ranks_on_gpu=self.on_gpu)

    def _direct_bandwidth(self) -> float:
        """Between devices: actors are taken to be on other hosts than ranks."""
        bandwidth = self.shape.machine.inter_host_bandwidth
        return bandwidth if self.on_gpu else min(CORE_BANDWIDTH, bandwidth)

    def _message_bandwidth(self) -> float:
        """Ray's messages are copied by a core, whatever the network."""
        return min(CORE_BANDWIDTH, self.shape.machine.inter_host_bandwidth)

    # --- bytes -------------------------------------------------------------------------------

    def bank_bytes(self) -> float:
        """A fused vector and the number of a step, of every item; and the layer that reads them."""
        return self._num_items() * (self.fused_bytes + _ID_BYTES) + _HEAD_STATES * self.head_bytes

    def copy_bytes(self) -> float:
        """The bank, and every trained value of encoder and last layer with its two moments."""
        trained = self.cost.encoder.parameters * ELEMENT_BYTES + self.head_bytes
        return self._num_items() * (self.fused_bytes + _ID_BYTES) + 3 * trained

    def refresh_bytes(self) -> float:
        """New vectors of all items beside the bank: a rank's own, twice, and those of all."""
        return self._num_items() * self.fused_bytes * (1 + 2 / self.shape.world_size)

    def batch_bytes(self) -> float:
        """Vectors of a rank's batch, and the contrastive loss."""
        vectors = _VECTORS_PER_ITEM * self.items.read * self.vector_bytes
        fused = (_FUSED_PER_ITEM * self.items.read + 2 * self.items.encoded) * self.fused_bytes
        loss = 0.0 if self.cost.cic is None else self.cost.cic.peak_bytes(self.items.candidates)
        return vectors + fused + loss

    def encoder_bytes(self) -> float:
        """Weights, gradients and optimizer states."""
        encoder = self.cost.encoder
        return encoder.weight_bytes + _STATES_PER_VALUE * encoder.parameters * ELEMENT_BYTES

    def encoding_bytes(self, num_items: int) -> float:
        """Tokens of a rank's share, and what its forward pass keeps for backward.

        Tokens wait in host memory: a GPU holds those of one micro batch.
        """
        size = self.config.gradient.micro_batch_items
        at_once = num_items if size is None else min(size, num_items)
        encoder = self.cost.encoder
        held = at_once if self.on_gpu else num_items
        return held * encoder.token_bytes + at_once * encoder.activation_bytes

    def _num_items(self) -> float:
        return self.growth * self.cost.items.num_items


def _encoding(
    encoder: EncoderCost, config: ContentConfig, num_items: int, twice: bool
) -> tuple[float, int, float]:
    """Flops, operations, and seconds on one core, of forward and backward of `num_items`."""
    pieces = _pieces(config, num_items)
    forwards = _forwards(pieces)
    flops = num_items * (forwards * encoder.forward_flops + encoder.backward_flops)
    core_s = num_items * (forwards * encoder.forward_s + encoder.backward_s)
    operations = pieces * (forwards * encoder.forward_operations + encoder.backward_operations)
    if twice:  # without gradient
        flops += num_items * encoder.forward_flops
        core_s += num_items * encoder.forward_s
        operations += pieces * encoder.forward_operations
    return flops, operations if num_items else 0, core_s


def _pieces(config: ContentConfig, num_items: int) -> int:
    size = config.gradient.micro_batch_items
    return 1 if size is None else ceil(num_items / size)


def _forwards(pieces: int) -> int:
    """Of more than one piece, backward computes each one's forward pass again."""
    return 1 + (pieces > 1)
