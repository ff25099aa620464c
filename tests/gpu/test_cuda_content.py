"""Content encoder and quantizer on a GPU against the CPU."""

import copy
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist

from multimodal.codes.config import Rq, Vq
from multimodal.codes.residual_fit import fit_residual
from multimodal.codes.residual_quantizer import CPU
from multimodal.codes.vector_quantizer import take_item_codebook
from multimodal.content_encoder import load_content_encoder
from multimodal.stopwatch import Stopwatch
from pipeline.content.group import meeting_place
from tests.distributed import run_distributed
from tests.multimodal.small_models import random_tokens, tiny_config, without
from tests.multimodal.test_alignment import gradients
from tests.multimodal.vector_sets import clustered
from tests.pipeline.tensor_groups import TIMEOUT_S, check_operations, join

pytestmark = pytest.mark.gpu

CONFIG = Rq(num_levels=3, codebook_size=32)
CLOSE = {"rtol": 1e-3, "atol": 1e-5}  # float32 through towers, fusion and back
FUSIONS: list[dict[str, object]] = [
    {"kind": "fq_former", "modality_embedding": True},
    {"kind": "fq_former", "num_layers": 2, "feed_forward": True},
    {"kind": "fq_former", "dim": 24, "mean_tokens": True},
    {"kind": "mean"},
    {"kind": "concat"},
]


@pytest.mark.parametrize("fusion", FUSIONS, ids=lambda fusion: "-".join(map(str, fusion.values())))
def test_vectors_and_gradients_are_those_of_the_cpu(cuda, fusion: dict[str, object]) -> None:
    here = load_content_encoder(tiny_config(fusion=fusion))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in here.named_parameters():
            if "lora_B" in name:  # starts at 0: without this, lora_A would have no gradient
                parameter.normal_(std=0.2)
    there = copy.deepcopy(here).to(cuda)
    batch = without(random_tokens(8), "image", [1, 7])
    weights_UD = torch.randn(8, 8)

    expected = here(batch)
    (expected * weights_UD).sum().backward()
    found = there(batch.to(cuda))
    (found * weights_UD.to(cuda)).sum().backward()

    torch.testing.assert_close(found.cpu(), expected, **CLOSE)
    trained = 0
    for (name, ours), theirs in zip(there.named_parameters(), here.parameters(), strict=True):
        if theirs.grad is None:
            assert ours.grad is None, name
            continue
        trained += bool(theirs.grad.any())
        torch.testing.assert_close(ours.grad.cpu(), theirs.grad, **CLOSE, msg=name)
    assert trained


def test_micro_batches_draw_the_dropout_of_backward_again_from_tokens_on_the_host(cuda) -> None:
    dropout = {"fusion": {"kind": "fq_former", "dropout": 0.5}}
    gradient = {"micro_batch_items": 3}
    encoder = load_content_encoder(tiny_config(**dropout, gradient=gradient)).to(cuda)
    batch = random_tokens(8)
    gradients = []
    for is_checkpointed in (True, False):
        encoder.zero_grad()
        torch.manual_seed(0)
        pieces = [encoder._fused(encoder.output.weight, piece) for piece in batch.split(3)]
        if is_checkpointed:
            torch.manual_seed(0)
            pieces = [encoder.fused(batch)]
        encoder.output(torch.cat(pieces)).square().sum().backward()
        gradients.append(encoder.output.weight.grad)
    torch.testing.assert_close(*gradients, **CLOSE)


def test_of_micro_batches_one_is_on_the_device_at_a_time(cuda) -> None:
    tokens = random_tokens(4000)
    size = sum(part.tokens_ULH.nbytes for part in tokens.modalities.values())
    most: dict[tuple[int | None, bool], int] = {}
    for pieces in (None, 100):
        encoder = load_content_encoder(tiny_config(gradient={"micro_batch_items": pieces})).to(cuda)
        for with_gradient in (True, False):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            with torch.set_grad_enabled(with_gradient):
                encoder(tokens).sum()
            most[pieces, with_gradient] = torch.cuda.max_memory_allocated() - before
    for with_gradient in (True, False):
        assert most[None, with_gradient] > size
        assert most[100, with_gradient] < most[None, with_gradient] / 4


def test_a_stopwatch_counts_the_work_of_the_device_without_waiting_for_it(cuda) -> None:
    watch = Stopwatch(torch.device("cuda"))
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(3):
        with watch.running():
            torch.cuda._sleep(200_000_000)  # cycles: a tenth of a second
    started_in = time.perf_counter() - started
    counted = watch.take()
    whole = time.perf_counter() - started
    assert started_in < 0.1 * whole
    assert 0.8 * whole < counted <= whole


def test_codes_of_the_gpu_are_those_of_the_cpu(cuda) -> None:
    x: np.ndarray = clustered(6000)
    books = fit_residual(x, CONFIG)

    codes = books.encode(x, cuda)
    fitted = fit_residual(x, CONFIG, device=cuda)

    assert np.array_equal(codes, books.encode(x))
    # Half-way between two codewords, too, where fp32 sums of another order decide otherwise.
    first = books.codebooks_LKD[0].numpy()
    ties = ((first[:-1].astype(np.float64) + first[1:]) / 2).astype(np.float32)
    assert np.array_equal(books.encode(ties, cuda), books.encode(ties))
    book, own = take_item_codebook(np.arange(len(x)), x), np.arange(len(x))
    near = [book.neighbours(Vq(top_k=9), device).encode(x, own) for device in (cuda, CPU)]
    assert np.array_equal(*near)
    assert fitted.codebooks_LKD.device.type == "cpu"
    assert fitted.squared_errors(x)[-1] < 1.02 * books.squared_errors(x)[-1]


def test_a_step_of_the_alignment_is_that_of_the_cpu(cuda) -> None:
    loss, found = gradients(5, slice(0, 12), "cuda")
    expected_loss, expected = gradients(5, slice(0, 12))
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_the_direct_transport_moves_tensors_between_gpus(cuda) -> None:
    num_gpus = torch.cuda.device_count()
    if num_gpus < 2:
        pytest.skip("one CUDA device: NCCL takes one process a GPU")
    run_distributed(_exchange, min(num_gpus, 4))


def _exchange() -> None:
    """Every process is a member with a GPU of its own; gloo only tells them where they meet."""
    member, size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", member)
    torch.cuda.set_device(device)
    store = meeting_place("127.0.0.1", 0, TIMEOUT_S, opens=True)
    ports = [store.port]
    dist.broadcast_object_list(ports, src=0)
    if member:
        store = meeting_place("127.0.0.1", ports[0], TIMEOUT_S)
    group = join(store, member, size, device)
    check_operations(group, member, size, device)
    dist.barrier()
    group.leave()
    dist.barrier()  # the store is that of member 0
