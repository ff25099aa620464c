"""What runs on every rank of the alignment's worker group: training on pairs, then encoding."""

# Shapes: N items, B pairs of this rank, D vector dim.

import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.lib.format import open_memmap
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from embedding.errors import UserError
from embedding.memory import keep_freed_memory
from multimodal.codes.alignment import AlignmentStep
from multimodal.codes.config import LEARNED_TEMPERATURES, AlignedVectors
from multimodal.codes.pair_sampler import PairSampler
from multimodal.content_encoder import (
    ContentEncoder,
    load_content_encoder,
    load_trained_state,
    standardise_on_ranks,
    trained_state,
)
from multimodal.rank_group import RankGroup
from multimodal.stored_content import ContentReader
from pipeline.codes.align import ENCODER, PART, RESULT, AlignJob
from pipeline.codes.align_facts import AlignmentResult
from pipeline.codes.pair_rows import read_pair_rows
from pipeline.devices import own_device

_ITEMS_PER_CHUNK = 256
_WARM_UP_SHARE = 0.1
_TEMPERATURE = "temperature"
"""In the encoder's file, beside its tensors, where it is learned."""

logger = logging.getLogger(__name__)


def align_worker(config: dict[str, str]) -> None:
    """Runs on every rank with `{"job": JSON of an AlignJob}`."""
    keep_freed_memory()
    job = AlignJob.model_validate_json(config["job"])
    device = own_device()
    reader = ContentReader(job.index, job.stores)
    reader.require_towers(job.content)
    encoder = load_content_encoder(job.content).to(device)
    state = {} if job.state is None else load_file(job.state)
    temperature = state.pop(_TEMPERATURE, None)
    if job.state is not None:
        load_trained_state(encoder, state)
    else:
        ranks = RankGroup(dist.group.WORLD)
        standardise_on_ranks(encoder, reader.read, reader.num_items, job.content.seed, ranks)
    if job.training is not None and job.pairs is not None:
        if temperature is None:
            temperature = torch.tensor(job.training.temperature)
        result = _train(encoder, reader, job, temperature.to(device))
        temperature = torch.tensor(result.temperature) if job.training.learn_temperature else None
        if dist.get_rank() == 0:
            (job.output / RESULT).write_text(result.model_dump_json(indent=2))
    _encode(encoder, reader, job, device)
    if dist.get_rank() == 0:
        state = {name: value.cpu().contiguous() for name, value in trained_state(encoder).items()}
        if temperature is not None:
            state[_TEMPERATURE] = temperature
        save_file(state, job.output / ENCODER)
    dist.barrier()


def _train(
    encoder: ContentEncoder, reader: ContentReader, job: AlignJob, temperature: Tensor
) -> AlignmentResult:
    """Train on the job's pairs; `temperature` is where the loss starts."""
    started = time.monotonic()
    config = job.training
    assert config is not None
    assert job.pairs is not None
    pairs = read_pair_rows(job.pairs)
    sampler = PairSampler([*pairs.values()], reader.num_items, config.seed)
    log_temperature = nn.Parameter(temperature.log(), requires_grad=config.learn_temperature)
    step = AlignmentStep(
        encoder.train(),
        reader.read,
        log_share_2N=(config.popularity_correction * sampler.log_share_2N).to(temperature.device),
        log_temperature=log_temperature,
        items_per_chunk=config.items_per_chunk,
    )
    optimizer = torch.optim.AdamW(_groups(encoder, log_temperature, config))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _rate(job.num_steps))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    losses: list[float] = []
    for number in range(job.num_steps):
        trigger, target = sampler.batch(number, config.batch_size // world_size * world_size)
        mine = slice(rank * len(trigger) // world_size, (rank + 1) * len(trigger) // world_size)
        optimizer.zero_grad()
        seed = (config.seed, number, rank)
        losses.append(step.backward(trigger[mine], target[mine], seed))
        require_finite(losses, config)
        optimizer.step()
        if config.learn_temperature:
            keep_in_bounds(log_temperature)
        schedule.step()
    tenth = max(1, len(losses) // 10)
    return AlignmentResult(
        steps=len(losses),
        first_loss=float(np.mean(losses[:tenth])),
        last_loss=float(np.mean(losses[-tenth:])),
        temperature=float(log_temperature.detach().exp()),
        seconds=time.monotonic() - started,
        num_pairs={source: len(rows_P2) for source, rows_P2 in pairs.items()},
    )


def keep_in_bounds(log_temperature: Tensor) -> None:
    """Clamp a temperature that is learned, in place."""
    low, high = LEARNED_TEMPERATURES
    with torch.no_grad():
        log_temperature.clamp_(math.log(low), math.log(high))


def require_finite(losses: Sequence[float], config: AlignedVectors) -> None:
    """Refuse a training whose newest loss is not finite; it is the loss of all ranks.

    Raises:
        UserError: naming the step, and what to change.
    """
    if math.isfinite(losses[-1]):
        return
    known = [loss for loss in losses if math.isfinite(loss)]
    before = f" (the step before: {known[-1]:.4g})" if known else ""
    raise UserError(
        f"codes.vectors: the alignment loss is {losses[-1]} at step {len(losses)}{before}, so its "
        f"vectors would mean nothing; lower codes.vectors.learning_rate={config.learning_rate} and "
        f"lora_learning_rate={config.lora_learning_rate}, or raise "
        f"temperature={config.temperature}"
    )


def _groups(
    encoder: ContentEncoder, log_temperature: nn.Parameter, config: AlignedVectors
) -> list[dict[str, object]]:
    trained = {n: p for n, p in encoder.named_parameters() if p.requires_grad}
    lora = [p for name, p in trained.items() if name.startswith("towers.")]
    rest = [p for name, p in trained.items() if not name.startswith("towers.")]
    decay = {"weight_decay": config.weight_decay}
    groups: list[dict[str, object]] = [{"params": rest, "lr": config.learning_rate, **decay}]
    if lora:
        groups.append({"params": lora, "lr": config.lora_learning_rate, **decay})
    if config.learn_temperature:
        groups.append({"params": [log_temperature], "lr": config.learning_rate})
    return groups


def _rate(num_steps: int) -> Callable[[int], float]:
    """Linear warm-up, then linearly to nothing."""
    warm_up = max(1, int(_WARM_UP_SHARE * num_steps))
    return lambda step: min((step + 1) / warm_up, max(0.0, (num_steps - step) / num_steps))


@torch.no_grad()
def _encode(
    encoder: ContentEncoder, reader: ContentReader, job: AlignJob, device: torch.device
) -> None:
    """Write the vectors of this rank's consecutive share of the items."""
    encoder.eval()

    def vectors_of(rows_U: Tensor) -> Tensor:
        batch = reader.read(rows_U).to(device)
        if job.standardised:
            return encoder.output.standardised(encoder.fused(batch))
        return nn.functional.normalize(encoder(batch), dim=1)

    rank, layer = dist.get_rank(), encoder.output
    rows = torch.from_numpy(np.load(job.rows)).tensor_split(dist.get_world_size())[rank]
    width = layer.in_features if job.standardised else layer.out_features
    num_broken = write_vectors(job.output / f"{PART}-{rank:05d}.npy", vectors_of, rows, width)
    _require_finite_vectors(num_broken, len(rows), job)


def write_vectors(
    file: Path, vectors_of: Callable[[Tensor], Tensor], rows: Tensor, width: int
) -> int:
    """Write vectors as .npy; no more than a chunk of them is in memory or on the device.

    Args:
        file: is made.
        vectors_of: of some rows, (U, width).
        rows: in the order of the file.
        width: of a vector.

    Returns:
        How many vectors hold NaN or infinity.
    """
    vectors_ND = open_memmap(file, "w+", np.float32, (len(rows), width))
    num_broken = 0
    for start in range(0, len(rows), _ITEMS_PER_CHUNK):
        chunk = rows[start : start + _ITEMS_PER_CHUNK]
        block_UD = vectors_of(chunk).float().cpu().numpy()
        vectors_ND[start : start + len(chunk)] = block_UD
        num_broken += int((~np.isfinite(block_UD).all(axis=1)).sum())
        del block_UD
    vectors_ND.flush()
    return num_broken


def _require_finite_vectors(num_broken: int, num_vectors: int, job: AlignJob) -> None:
    """Refuse what the last step of a training broke: no loss was computed after it."""
    if not num_broken:
        return
    what = "lower codes.vectors.learning_rate and lora_learning_rate"
    if job.training is None:
        what = f"the encoder {job.state} or its towers are damaged: remove that run's align folder"
    raise UserError(
        f"codes.vectors: the encoder gives {num_broken} of {num_vectors} items a vector with "
        f"NaN or infinity; {what}"
    )
