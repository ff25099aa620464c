"""Every classifier against loops over samples, fields and pairs that follow its formula."""

from collections.abc import Callable
from itertools import combinations
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from embedding.errors import UserError
from ranking import classifier_config as config
from ranking.cin import chunk_rows, compress, compress_plain
from ranking.classifiers.build import build_classifier
from ranking.classifiers.inputs import ClassifierInputs, InputDims
from ranking.interactions import FieldPairs, InnerProducts

# float32 sums of up to some thousand terms of order one.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
B, F, D = 3, 5, 4
DIMS = InputDims(fields=tuple((f"f{i}", D) for i in range(F)), num_dense=2, interest=3)
NO_DENSE = InputDims(fields=DIMS.fields, num_dense=0, interest=0)
PAIRS = list(combinations(range(F), 2))
KINDS = get_args(get_args(config.Classifier)[0])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make_inputs(dims: InputDims = DIMS) -> ClassifierInputs:
    return ClassifierInputs(
        torch.randn(B, dims.num_fields * D, requires_grad=True),
        torch.randn(B, dims.num_dense),
        torch.randn(B, dims.interest),
    )


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return torch.stack([row @ x for row in layer.weight]) + layer.bias


def through(stack: nn.Sequential, x: Tensor) -> Tensor:
    for layer in stack:
        x = x.clamp(min=0) if isinstance(layer, nn.ReLU) else linear(layer, x)
    return x


def filled(*parts: Tensor) -> Tensor:
    """Parts side by side with zeros up to a multiple of 16 behind them."""
    joined = torch.cat(parts)
    return torch.cat([joined, torch.zeros(-len(joined) % 16)])


def compare(
    classifier: nn.Module,
    reference: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    dims: InputDims = DIMS,
) -> None:
    """Forward and all gradients; `reference` reads one sample: fields (F, D), flat, dense, rest."""
    inputs = make_inputs(dims)
    slow = torch.stack(
        [
            reference(
                fields.view(dims.num_fields, D), filled(fields, dense, interest), dense, interest
            )
            for fields, dense, interest in zip(
                inputs.fields_BX, inputs.dense_BX, inputs.interests_BX, strict=True
            )
        ]
    )
    fast = classifier(inputs)
    assert fast.shape == (B, classifier.output_dim)
    torch.testing.assert_close(fast, slow, **CLOSE)
    weights = torch.randn_like(slow)
    wanted = [inputs.fields_BX, *classifier.parameters()]
    ours, loop = (
        torch.autograd.grad((out * weights).sum(), wanted, allow_unused=True)
        for out in (fast, slow)
    )
    for a, b in zip(ours, loop, strict=True):
        if b is None:
            assert a is None or not a.any()
        else:
            torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("dims", [DIMS, NO_DENSE], ids=["all", "fields_only"])
def test_every_classifier_has_the_width_it_says_and_trains_in_both_precisions(
    kind: type[config.Classifier], dims: InputDims
) -> None:
    classifier = build_classifier(kind(), dims)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make_inputs(dims)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = classifier(
                ClassifierInputs(
                    inputs.fields_BX.to(dtype),
                    inputs.dense_BX.to(dtype),
                    inputs.interests_BX.to(dtype),
                )
            )
        assert out.shape == (B, classifier.output_dim)
        # Nothing on the way widened it, except beside columns that are sums of a logit.
        sums = (config.Fm, config.Ffm, config.WideDeep, config.DeepFm, config.Ccpm)
        has_sums = issubclass(kind, (*sums, config.XDeepFm, config.FinalMlp))
        assert out.dtype == (torch.float32 if has_sums else dtype)
        out.float().square().sum().backward()
        assert inputs.fields_BX.grad is not None
        assert inputs.fields_BX.grad.isfinite().all()
        assert inputs.fields_BX.grad.any(dim=0).all()


def test_configurations_have_kinds_of_their_own() -> None:
    assert len({kind().kind for kind in KINDS}) == len(KINDS) == 17


def fm(fields: Tensor) -> Tensor:
    return sum((fields[a] @ fields[b] for a, b in PAIRS), torch.zeros(())).unsqueeze(0)


def test_lr_hands_every_column_to_the_heads() -> None:
    compare(build_classifier(config.LogisticRegression(), DIMS), lambda fields, flat, *_: flat)


def test_fm_adds_all_pairs() -> None:
    model = build_classifier(config.Fm(), DIMS)
    compare(
        model, lambda fields, flat, *_: torch.cat([linear(model.first_order, flat), fm(fields)])
    )


def test_ffm_adds_products_of_field_aware_vectors() -> None:
    model = build_classifier(config.Ffm(dim=3), DIMS)

    def second(fields: Tensor) -> Tensor:
        total = torch.zeros(())
        for a, b in PAIRS:
            a_to_b = model.projection_FFKD[a, b] @ fields[a]
            b_to_a = model.projection_FFKD[b, a] @ fields[b]
            total = total + a_to_b @ b_to_a
        return total.unsqueeze(0)

    compare(
        model, lambda fields, flat, *_: torch.cat([linear(model.first_order, flat), second(fields)])
    )


def test_dnn_is_its_mlp() -> None:
    model = build_classifier(config.Dnn(hidden=(6, 4)), DIMS)
    compare(model, lambda fields, flat, *_: through(model.mlp, flat))


def test_wide_and_deep_adds_a_first_order_term() -> None:
    model = build_classifier(config.WideDeep(hidden=(6,)), DIMS)
    compare(
        model,
        lambda fields, flat, *_: torch.cat(
            [through(model.mlp, flat), linear(model.first_order, flat)]
        ),
    )


def test_deepfm_adds_first_and_second_order_to_the_mlp() -> None:
    model = build_classifier(config.DeepFm(hidden=(6,)), DIMS)
    compare(
        model,
        lambda fields, flat, *_: torch.cat(
            [through(model.mlp, flat), linear(model.first_order, flat), fm(fields)]
        ),
    )


@pytest.mark.parametrize("rank", [None, 3])
def test_dcn_v2_puts_cross_layers_beside_the_mlp(rank: int | None) -> None:
    model = build_classifier(config.DcnV2(hidden=(6,), num_cross_layers=2, rank=rank), DIMS)

    def reference(fields: Tensor, flat: Tensor, *_: Tensor) -> Tensor:
        x = flat
        for layer in model.cross.layers:
            low = x if rank is None else torch.stack([row @ x for row in layer[0].weight])
            x = flat * linear(layer if rank is None else layer[1], low) + x
        return torch.cat([x, through(model.mlp, flat)])

    compare(model, reference)


@pytest.mark.parametrize("form", ["parallel", "serial"])
def test_masknet_multiplies_with_masks_of_the_sample(form: str) -> None:
    hidden_widths = {"hidden": (4,)} if form == "parallel" else {}
    settings = config.MaskNet(form=form, num_blocks=2, block_dim=6, **hidden_widths)
    model = build_classifier(settings, DIMS)
    model.scale_FD.data.normal_()
    model.shift_FD.data.normal_()

    def normed(x: Tensor) -> Tensor:
        return (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()

    def reference(fields: Tensor, flat: Tensor, dense: Tensor, interest: Tensor) -> Tensor:
        vectors = [normed(fields[f]) * model.scale_FD[f] + model.shift_FD[f] for f in range(F)]
        hidden = filled(*vectors, dense, interest)
        outputs = []
        for mask, block in zip(model.masks, model.blocks, strict=True):
            mapped = linear(block[0], through(mask, flat) * hidden)
            outputs.append((normed(mapped) * block[1].weight + block[1].bias).clamp(min=0))
            hidden = outputs[-1] if form == "serial" else hidden
        return outputs[-1] if form == "serial" else through(model.mlp, torch.cat(outputs))

    compare(model, reference)


def test_final_mlp_fuses_two_gated_mlps_bilinearly() -> None:
    settings = config.FinalMlp(first_hidden=(8,), second_hidden=(4,), num_heads=2, gate_hidden=3)
    model = build_classifier(settings, DIMS)

    def reference(fields: Tensor, flat: Tensor, *_: Tensor) -> Tensor:
        gates = [
            2 * torch.sigmoid(through(model.gates[i][:-1], model.context_2X[i])) for i in (0, 1)
        ]
        first, second = (
            through(model.first, flat * gates[0]),
            through(model.second, flat * gates[1]),
        )
        fused = [
            first[4 * h : 4 * h + 4] @ model.fusion_HXX[h] @ second[2 * h : 2 * h + 2]
            for h in (0, 1)
        ]
        return torch.cat([first, second, torch.stack(fused)])

    compare(model, reference)


@pytest.mark.parametrize("num_fields", [1, 2, 3, 4, 7, 8])
def test_inner_products_hold_every_pair_once(num_fields: int) -> None:
    products = InnerProducts(num_fields)
    fields = torch.randn(2, num_fields, D, requires_grad=True)
    pairs = products.pairs()
    slow = (
        torch.stack([(fields[:, a] * fields[:, b]).sum(dim=1) for a, b in pairs], dim=1)
        if pairs
        else torch.zeros(2, 0)
    )

    assert {frozenset(pair) for pair in pairs} == {
        frozenset(pair) for pair in combinations(range(num_fields), 2)
    }
    assert len(pairs) == products.num_pairs
    fast = products(fields)
    torch.testing.assert_close(fast, slow, **CLOSE)
    if pairs:
        weights = torch.randn_like(slow)
        ours, loop = (torch.autograd.grad((x * weights).sum(), fields)[0] for x in (fast, slow))
        torch.testing.assert_close(ours, loop, **CLOSE)


def test_field_pairs_put_the_pairs_first() -> None:
    pairs = FieldPairs(F)
    left_BFD, right_BFD = torch.randn(B, F, D), torch.randn(B, F, D)
    left_PBD, right_PBD = pairs(left_BFD, right_BFD)
    for p, (a, b) in enumerate(PAIRS):
        assert left_PBD[p].equal(left_BFD[:, a])
        assert right_PBD[p].equal(right_BFD[:, b])


def test_ipnn_reads_products_and_everything() -> None:
    model = build_classifier(config.Ipnn(hidden=(6,)), DIMS)

    def reference(fields: Tensor, _: Tensor, *rest: Tensor) -> Tensor:
        columns = [fields.flatten(), *rest]
        products = torch.stack([fields[a] @ fields[b] for a, b in model.products.pairs()])
        return through(model.mlp, filled(products, *columns))

    compare(model, reference)


@pytest.mark.parametrize("kernel", ["matrix", "vector", "number"])
def test_opnn_weighs_the_outer_product_of_every_pair(kernel: str) -> None:
    model = build_classifier(config.Opnn(hidden=(6,), kernel=kernel), DIMS)

    def reference(fields: Tensor, _: Tensor, *rest: Tensor) -> Tensor:
        columns = [fields.flatten(), *rest]
        products = []
        for p, (a, b) in enumerate(PAIRS):
            weights = model.kernels[p]
            if kernel != "matrix":
                weights = torch.diag(weights.expand(1, D)[0])
            products.append((torch.outer(fields[a], fields[b]) * weights).sum())
        return through(model.mlp, filled(torch.stack(products), *columns))

    compare(model, reference)


def test_pin_runs_a_small_network_on_every_pair() -> None:
    model = build_classifier(config.Pin(hidden=(6,), pair_hidden=3, pair_dim=2), DIMS)

    def small(layer: nn.Module, p: int, x: Tensor) -> Tensor:
        return (x @ layer.weight_EDH[p] + layer.bias_E1H[p, 0]).clamp(min=0)

    def reference(fields: Tensor, _: Tensor, *rest: Tensor) -> Tensor:
        columns = [fields.flatten(), *rest]
        outputs = []
        for p, (a, b) in enumerate(PAIRS):
            pair = torch.cat([fields[a], fields[b], fields[a] * fields[b]])
            outputs.append(small(model.output, p, small(model.hidden, p, pair)))
        return through(model.mlp, filled(*outputs, *columns))

    compare(model, reference)


@pytest.mark.parametrize("dims", [DIMS, NO_DENSE], ids=["dense", "no_dense"])
def test_dlrm_multiplies_the_dense_vector_like_a_field(dims: InputDims) -> None:
    model = build_classifier(config.Dlrm(hidden=(6,), bottom_hidden=(5,)), dims)

    def reference(fields: Tensor, flat: Tensor, dense: Tensor, interest: Tensor) -> Tensor:
        columns = [interest]
        if dims.num_dense:
            columns.append(through(model.bottom, dense))
            fields = torch.cat([columns[-1].unsqueeze(0), fields])
        products = torch.stack([fields[a] @ fields[b] for a, b in model.products.pairs()])
        return through(model.mlp, filled(products, *columns))

    compare(model, reference, dims)
    assert model.mlp[0].in_features % 16 == 0


@pytest.mark.parametrize("bilinear", ["all", "each", "interaction"])
def test_fibinet_reads_bilinear_products_of_raw_and_weighted_fields(bilinear: str) -> None:
    model = build_classifier(config.FiBiNet(hidden=(6,), bilinear=bilinear), DIMS)

    def reference(fields: Tensor, _: Tensor, *rest: Tensor) -> Tensor:
        columns = [fields.flatten(), *rest]
        weights = through(model.excitation, torch.stack([fields[f].mean() for f in range(F)]))
        weighted = torch.stack([fields[f] * weights[f] for f in range(F)])
        products = []
        for vectors, matrices in zip((fields, weighted), model.bilinear, strict=True):
            for p, (a, b) in enumerate(PAIRS):
                matrix = matrices[{"all": 0, "each": a, "interaction": p}[bilinear]]
                products.append((vectors[a] @ matrix) * vectors[b])
        return through(model.mlp, filled(*products, *columns))

    compare(model, reference)


def test_ccpm_convolves_and_keeps_the_largest_in_order() -> None:
    model = build_classifier(config.Ccpm(maps=(2, 2), heights=(3, 2)), DIMS)

    def reference(fields: Tensor, flat: Tensor, *_: Tensor) -> Tensor:
        maps = fields.unsqueeze(0)
        for layer, convolution in enumerate(model.convolutions):
            height = convolution.weight.shape[2]
            padded = torch.cat([torch.zeros(len(maps), height - 1, D), maps], dim=1)
            padded = torch.cat([padded, torch.zeros(len(maps), height - 1, D)], dim=1)
            weight_CKT = convolution.weight[..., 0]
            rows = [
                torch.einsum("ktd,ckt->cd", padded[:, r : r + height], weight_CKT)
                for r in range(padded.shape[1] - height + 1)
            ]
            wide = torch.stack(rows, dim=1) + convolution.bias[:, None, None]
            k = max(3, int((1 - (1 / 2) ** 1) * F)) if layer == 0 else 3
            pooled = torch.empty(len(wide), min(k, wide.shape[1]), D)
            values = wide.detach().transpose(1, 2)
            columns = []
            for c in range(len(wide)):
                for d in range(D):
                    ranked = sorted(
                        range(wide.shape[1]), key=values[c, d].__getitem__, reverse=True
                    )
                    columns.append(wide[c, sorted(ranked[: pooled.shape[1]]), d])
            maps = torch.stack(columns).view(len(wide), D, -1).transpose(1, 2).tanh()
        return torch.cat([maps.flatten(), linear(model.first_order, flat)])

    compare(model, reference)


def test_xdeepfm_compresses_outer_products_column_by_column() -> None:
    model = build_classifier(config.XDeepFm(maps=(3, 2), hidden=(6,)), DIMS)

    def reference(fields: Tensor, flat: Tensor, *_: Tensor) -> Tensor:
        maps, sums = fields, []
        for layer in [interaction.linear for interaction in model.layers]:
            new = []
            for h in range(layer.weight.shape[0]):
                weights = layer.weight[h].view(len(maps), F)
                total = torch.zeros(D)
                for i in range(len(maps)):
                    for j in range(F):
                        total = total + weights[i, j] * maps[i] * fields[j]
                new.append(total)
            maps = torch.stack(new)
            sums.append(maps.sum(dim=1))
        return torch.cat([*sums, through(model.mlp, flat), linear(model.first_order, flat)])

    compare(model, reference)


@pytest.mark.parametrize("rows", [5, 512, 1200])
def test_chunked_compression_agrees_with_its_plain_twin(rows: int) -> None:
    maps_RH, fields_RF = (torch.randn(rows, n, requires_grad=True) for n in (3, 5))
    weight_OX = torch.randn(4, 15, requires_grad=True)
    inputs = (maps_RH, fields_RF, weight_OX)
    fast, plain = compress(*inputs), compress_plain(*inputs)
    weights = torch.randn_like(plain)
    torch.testing.assert_close(fast, plain, **CLOSE)
    ours, twin = (torch.autograd.grad((x * weights).sum(), inputs) for x in (fast, plain))
    for a, b in zip(ours, twin, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # sums over up to 1,200 rows


def test_a_gpu_compresses_as_many_rows_at_a_time_as_its_budget_holds() -> None:
    bytes_per_row = 64 * 26 * 2  # bf16
    assert chunk_rows("cpu", bytes_per_row) == 512
    rows = chunk_rows("cuda", bytes_per_row)
    assert rows * bytes_per_row <= 256 * 2**20 < (rows + 1) * bytes_per_row
    assert chunk_rows("cuda", 2**40) == 1


def test_autoint_attends_between_fields() -> None:
    model = build_classifier(config.AutoInt(hidden=(6,), num_heads=2, head_dim=3), DIMS)

    def reference(fields: Tensor, flat: Tensor, *_: Tensor) -> Tensor:
        vectors = list(fields)
        for layer in model.layers:
            query, key, value, residual = layer.input.weight.chunk(4)
            new = []
            for here in vectors:
                heads = []
                for part in (slice(0, 3), slice(3, 6)):
                    scores = [(query[part] @ here) @ (key[part] @ there) for there in vectors]
                    shares = torch.stack(scores).softmax(dim=0)
                    heads.append(
                        sum(
                            s * (value[part] @ there)
                            for s, there in zip(shares, vectors, strict=True)
                        )
                    )
                new.append((torch.cat(heads) + residual @ here).clamp(min=0))
            vectors = new
        return torch.cat([*vectors, through(model.mlp, flat)])

    compare(model, reference)


def test_classifiers_that_combine_fields_refuse_different_dims() -> None:
    dims = InputDims(fields=(("a", 8), ("b", 4)), num_dense=0, interest=0)
    for kind in KINDS:
        if kind in config.READ_ANY_DIMS:
            build_classifier(kind(), dims)
            continue
        with pytest.raises(UserError, match=rf"{kind().kind} .*'a': 8, 'b': 4.*field_dim"):
            build_classifier(kind(), dims)
