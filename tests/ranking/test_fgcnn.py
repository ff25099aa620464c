"""FGCNN against a loop over samples, columns, maps and heights."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from ranking.classifier_config import Ipnn
from ranking.classifiers.build import build_classifier
from ranking.classifiers.inputs import InputDims
from ranking.fgcnn import ConvolutionBlock, FeatureGenerator, pool_tanh, pool_tanh_plain
from ranking.fgcnn_config import Fgcnn

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def one_block(height: int = 3, pool: int = 2, **settings: object) -> Fgcnn:
    return Fgcnn(maps=(3,), heights=(height,), pools=(pool,), new_maps=(2,), **settings)


@pytest.mark.parametrize(
    ("num_fields", "dim", "config", "heights", "num_new", "num_products", "mlp_inputs"),
    [
        (
            39,
            20,
            Fgcnn(maps=(38, 40, 42, 44), heights=(9, 9, 9, 9)),
            (20, 10, 5, 3),
            114,
            11_628,
            14_688,
        ),
        (24, 40, Fgcnn(), (12, 6, 3, 2), 69, 4_278, 7_998),
    ],
    ids=["criteo", "avazu"],
)
def test_shapes_are_the_papers(
    num_fields: int,
    dim: int,
    config: Fgcnn,
    heights: tuple[int, ...],
    num_new: int,
    num_products: int,
    mlp_inputs: int,
) -> None:
    generator = FeatureGenerator(config, num_fields, dim)
    features = generator(torch.randn(2, num_fields, dim))
    num_all = num_fields + num_new
    dims = InputDims(fields=tuple((str(i), dim) for i in range(num_all)), num_dense=0, interest=0)
    classifier = build_classifier(Ipnn(hidden=(4,)), dims)

    assert config.pooled_heights(num_fields) == heights
    assert [x.shape[1] // dim for x in features] == [3 * height for height in heights]
    assert generator.num_features == num_new
    assert classifier.products.num_pairs == num_products
    assert num_products + dims.columns == mlp_inputs
    # Zero columns fill it up to a multiple of 16.
    assert classifier.mlp[0].in_features - mlp_inputs == -mlp_inputs % 16


def convolve_by_loop(maps_BCHD: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Same padding over the feature axis only, one multiplication at a time."""
    (batch, in_maps, rows, dim), (out_maps, _, height, _) = maps_BCHD.shape, weight.shape
    out = []
    for b, c, row, d in product(range(batch), range(out_maps), range(rows), range(dim)):
        total = bias[c]
        for k in range(in_maps):
            for tap in range(height):
                source = row + tap - (height - 1) // 2
                if 0 <= source < rows:
                    total = total + weight[c, k, tap, 0] * maps_BCHD[b, k, source, d]
        out.append(total)
    return torch.stack(out).view(batch, out_maps, rows, dim)


def pool_by_loop(maps_BCHD: Tensor, pool: int, *, ceil: bool) -> Tensor:
    rows = maps_BCHD.shape[2]
    starts = [start for start in range(0, rows, pool) if ceil or start + pool <= rows]
    return torch.stack([maps_BCHD[:, :, s : s + pool].amax(dim=2) for s in starts], dim=2)


def generate_by_loop(generator: FeatureGenerator, fields_BFD: Tensor, *, ceil: bool) -> Tensor:
    """All new features, (B, N, D): recombination as a loop over output values."""
    maps_BCHD = fields_BFD.unsqueeze(1)
    features = []
    for block, recombination in zip(generator.blocks, generator.recombinations, strict=True):
        convolved = convolve_by_loop(maps_BCHD, block.convolution.weight, block.convolution.bias)
        maps_BCHD = pool_by_loop(convolved.tanh(), block.pool, ceil=ceil)
        linear = recombination[0]
        for sample in maps_BCHD:
            # The flattened map is read height by height, column by column, map by map.
            flat = torch.stack(
                [
                    sample[c, h, d]
                    for h in range(sample.shape[1])
                    for d in range(sample.shape[2])
                    for c in range(sample.shape[0])
                ]
            )
            features.append(torch.stack([row @ flat for row in linear.weight]) + linear.bias)
    per_block = len(fields_BFD)
    blocks = [torch.stack(features[i : i + per_block]) for i in range(0, len(features), per_block)]
    return torch.cat(blocks, dim=1).tanh().unflatten(1, (-1, generator.dim))


@pytest.mark.parametrize("num_fields", [5, 6])
@pytest.mark.parametrize("rounding", ["ceil", "floor"])
@pytest.mark.parametrize(("height", "pool"), [(3, 2), (4, 2), (2, 3)])
def test_generator_equals_a_loop_forward_and_gradient(
    num_fields: int, rounding: str, height: int, pool: int
) -> None:
    deep = num_fields // pool >= pool  # a second block needs a window to pool
    blocks = 2 if deep else 1
    config = Fgcnn(
        maps=(2, 3)[:blocks],
        heights=(height, 3)[:blocks],
        pools=(pool,) * blocks,
        new_maps=(2, 1)[:blocks],
        pool_rounding=rounding,
    )
    generator = FeatureGenerator(config, num_fields, 4)
    fields = torch.randn(2, num_fields, 4, requires_grad=True)
    inputs = [fields, *generator.parameters()]

    fast = torch.cat(generator(fields), dim=1).unflatten(1, (-1, 4))
    slow = generate_by_loop(generator, fields, ceil=rounding == "ceil")
    weights = torch.randn_like(slow)

    torch.testing.assert_close(fast, slow, **CLOSE)
    for ours, loop in zip(
        torch.autograd.grad((fast * weights).sum(), inputs),
        torch.autograd.grad((slow * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, loop, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "pool", "ceil"),
    [(7, 2, True), (7, 2, False), (6, 2, True), (8, 3, True), (8, 3, False), (5, 1, True)]
    + [(4, 7, True)],
)
def test_pooling_agrees_with_its_plain_twin(
    rows: int, pool: int, ceil: bool, dtype: torch.dtype
) -> None:
    maps = torch.randn(2, 3, rows, 4, dtype=dtype).to(memory_format=torch.channels_last)
    maps.requires_grad_()

    fast, plain = pool_tanh(maps, pool, ceil=ceil), pool_tanh_plain(maps, pool, ceil=ceil)
    weights = torch.randn_like(plain)

    torch.testing.assert_close(fast, plain)
    fast_grad, plain_grad = (torch.autograd.grad(x, maps, weights)[0] for x in (fast, plain))
    torch.testing.assert_close(fast_grad, plain_grad)


def test_equal_members_of_a_window_give_the_gradient_to_one_of_them() -> None:
    maps = torch.full((1, 1, 4, 1), 0.5, requires_grad=True)
    pool_tanh(maps, 4, ceil=True).sum().backward()
    assert maps.grad is not None
    assert maps.grad.flatten().tolist() == pytest.approx([1 - math.tanh(0.5) ** 2, 0, 0, 0])


def test_batch_norm_stands_between_convolution_and_tanh() -> None:
    block = ConvolutionBlock(one_block(batch_norm=True), 0, 1).train()
    block.norm.weight.data = torch.tensor([1.0, -2.0, 0.5])  # pooling after it must see the sign
    fields_B1FD = torch.randn(4, 1, 5, 4)

    convolved = convolve_by_loop(fields_B1FD, block.convolution.weight, block.convolution.bias)
    mean = convolved.mean(dim=(0, 2, 3), keepdim=True)
    spread = convolved.var(dim=(0, 2, 3), keepdim=True, unbiased=False)
    normed = (convolved - mean) / (spread + block.norm.eps).sqrt()
    normed = normed * block.norm.weight[:, None, None] + block.norm.bias[:, None, None]

    expected = pool_by_loop(normed.tanh(), 2, ceil=True)
    torch.testing.assert_close(block(fields_B1FD), expected, **CLOSE)


def test_shuffled_generator_reads_the_fields_in_a_seeded_order() -> None:
    fields_BFD = torch.randn(3, 8, 4)
    plain, shuffled = (FeatureGenerator(one_block(shuffle_seed=seed), 8, 4) for seed in (None, 5))
    again = FeatureGenerator(one_block(shuffle_seed=5), 8, 4)
    plain.load_state_dict(shuffled.state_dict())

    assert shuffled.order_F.equal(again.order_F)
    assert sorted(shuffled.order_F.tolist()) == list(range(8)) != shuffled.order_F.tolist()
    torch.testing.assert_close(
        shuffled(fields_BFD)[0], plain(fields_BFD[:, shuffled.order_F])[0], **CLOSE
    )


def test_without_recombination_every_pooled_map_is_a_feature() -> None:
    config = one_block(recombination=False)
    generator = FeatureGenerator(config, 5, 4)
    fields_BFD = torch.randn(2, 5, 4)

    (features,) = generator(fields_BFD)
    maps_BCHD = generator.blocks[0](fields_BFD.unsqueeze(1))

    assert config.num_new_features(5) == (9,)
    features_BND = features.unflatten(1, (-1, 4))
    for row in range(3):
        for c in range(3):
            assert features_BND[:, row * 3 + c].equal(maps_BCHD[:, c, row])


def test_mlp_blocks_are_dense_layers_of_the_same_widths() -> None:
    config = one_block(blocks="mlp")
    generator = FeatureGenerator(config, 5, 4)
    fields_BFD = torch.randn(2, 5, 4)

    hidden = generator.blocks[0].linear(fields_BFD.flatten(1)).tanh()
    expected = generator.recombinations[0][0](hidden).tanh()

    assert isinstance(generator.blocks[0].linear, nn.Linear)
    assert hidden.shape[1] == 3 * 3 * 4
    torch.testing.assert_close(generator(fields_BFD)[0], expected, **CLOSE)
