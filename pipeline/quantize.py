"""Codes of all items of a day: with yesterday's codebooks, or with new ones that go on with them.

Reads item vectors and the versions of the codebooks. Writes `codes.parquet` (item_id, sid_0, ...,
optional sid_suffix and vq) and, on a refit, a new codebook version.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from embedding.errors import UserError
from embedding.raw_ids import Int64Array
from embedding.samples import CODEBOOKS
from multimodal.code_metrics import CodeMetrics, Stability, measure_codes, stability
from multimodal.code_tree import CodedItems, Suffixes, tell_apart
from multimodal.codebook_match import BoolArray
from multimodal.codebook_refit import (
    CodesInUse,
    Drift,
    RefitDecision,
    age_in_days,
    decide_refit,
    measure_drift,
    refit,
)
from multimodal.codebook_store import Codebooks
from multimodal.codebook_versions import (
    CodebookManifest,
    find_version,
    load_version,
    next_version,
    publish_version,
)
from multimodal.codes_config import Codes
from multimodal.residual_fit import codebooks_in_space
from multimodal.residual_quantizer import CPU
from multimodal.vector_quantizer import restate_items
from multimodal.vectors import Float32Array, FloatArray, Int32Array, mean_cosine
from pipeline.code_features import CODES_FILE, NearItems, codes_table
from pipeline.quantize_facts import QuantizeFacts, collapse_warning


@dataclass(frozen=True)
class ItemVectors:
    """Aligned vectors of all items of a day, in memory or memory-mapped."""

    item_ids_N: Int64Array
    vectors_ND: FloatArray
    encoder: str
    """Identity of the encoder."""
    first_day: str
    """Of the days whose items these are."""
    last_day: str
    earlier: pa.Table | None = None
    """Codes of the day before: suffixes stay with their items, and codebooks for a new encoder are
    matched through the items of both days."""
    version: str | None = None
    """Codebooks of the day before; None on the first day."""
    seen_N: BoolArray | None = None
    """Items that codebooks may be fitted to; the others only get codes. None: all of them."""

    @cached_property
    def seen(self) -> "ItemVectors":
        """The items that codebooks may be fitted to; a copy of their vectors, made once."""
        if self.seen_N is None or self.seen_N.all():
            return self
        return replace(
            self,
            item_ids_N=self.item_ids_N[self.seen_N],
            vectors_ND=self.vectors_ND[self.seen_N],
            seen_N=None,
        )


def quantize(
    config: Codes,
    items: ItemVectors,
    root: Path,
    scratch: Path,
    *,
    force_refit: bool = False,
    device: torch.device = CPU,
) -> QuantizeFacts:
    """Write the codes of a day into `scratch`, and new codebooks into `root` where they are due.

    Args:
        config: the recipe's codes.
        items: all items of the day.
        root: directory of the codebook versions.
        scratch: an existing directory.
        force_refit: fit anew whatever the policy says.
        device: for the arithmetic.

    Raises:
        UserError: unusable vectors, unknown or damaged codebooks, or codebooks that belong to other
            settings.
    """
    _check_room(config, len(items.seen.item_ids_N))
    state = _State.read(root, config.version or items.version)
    coded = _encode(items, state.codebooks, device) if state.fits(config, items) else None
    drift = _drift(items.seen, state, coded) if coded else None
    decision = _decide(config, items, state, drift)
    if force_refit and not decision.refit:
        decision = RefitDecision(refit=True, reasons=("asked for",))
    if config.version:
        decision = _keep_version(config.version, decision, fits=coded is not None)
    cosine = mean_cosine(items.seen.vectors_ND)
    if decision.refit:
        _check_size(config, items)
        warning = collapse_warning(cosine)
        if warning:
            decision = RefitDecision(refit=True, reasons=(*decision.reasons, warning))
        version = _fit_version(config, items.seen, root, _known(items, state), device)
        state = _State.read(root, version)
        coded = _encode(items, state.codebooks, device)
    assert coded
    suffixes = _suffixes(config, items, coded)
    near = None
    if config.vq:
        book = state.codebooks.items
        assert book
        _check_room(config, book.num_codes)
        own_N = book.slots_of(items.item_ids_N)
        near = NearItems(own_N, book.neighbours(config.vq, device).encode(items.vectors_ND, own_N))
    table = codes_table(
        items.item_ids_N,
        coded.codes_NL,
        suffixes.suffix_N if suffixes else None,
        near,
        _dense(config, items),
    )
    codebooks = f"{state.version}-{state.codebooks.fingerprint}"
    table = table.replace_schema_metadata({CODEBOOKS: codebooks})
    pq.write_table(table, scratch / CODES_FILE, compression="zstd")
    return QuantizeFacts(
        version=state.version,
        codebooks=codebooks,
        refit=decision,
        drift=drift,
        num_items=len(items.item_ids_N),
        num_unseen_items=len(items.item_ids_N) - len(items.seen.item_ids_N),
        num_new_items=int(_is_new(items.seen, state.codebooks).sum()),
        table_sizes=state.codebooks.table_sizes
        | ({"sid_suffix": config.suffix.num_codes} if config.suffix else {}),
        metrics=coded.metrics,
        stability=stability_of_items(items.earlier, items.item_ids_N, coded.codes_NL),
        num_sharing_suffix=suffixes.num_shared if suffixes else 0,
        mean_cosine=cosine,
    )


@dataclass(frozen=True)
class _State:
    """The codebooks in use."""

    codebooks: Codebooks
    manifest: CodebookManifest | None

    @classmethod
    def read(cls, root: Path, version: str | None) -> "_State":
        if version is None:
            return cls(Codebooks(), None)
        return cls(load_version(root, version), find_version(root, version))

    @property
    def version(self) -> str:
        assert self.manifest
        return self.manifest.version

    def fits(self, config: Codes, items: ItemVectors) -> bool:
        """True if these codebooks can code the items as the config asks."""
        if self.manifest is None or self.manifest.encoder != items.encoder:
            return False
        was = self.manifest.config
        return (was.rq, was.vq is None) == (config.rq, config.vq is None)


@dataclass(frozen=True)
class _Coded:
    codes_NL: Int32Array
    """No columns without RQ codes."""
    metrics: CodeMetrics | None
    """Of the items that a fit may use."""
    seen_codes_NL: Int32Array
    """Of these items."""


def _encode(items: ItemVectors, codebooks: Codebooks, device: torch.device) -> _Coded:
    if codebooks.residual is None:
        none = np.empty((len(items.item_ids_N), 0), np.int32)
        return _Coded(none, None, none)
    codes_NL = codebooks.residual.encode(items.vectors_ND, device)
    seen = items.seen
    of_seen = codes_NL if seen is items else codes_NL[items.seen_N]
    metrics = measure_codes(seen.vectors_ND, of_seen, codebooks.residual, device=device)
    return _Coded(codes_NL, metrics, of_seen)


def _is_new(items: ItemVectors, codebooks: Codebooks) -> np.ndarray:
    fitted = codebooks.fitted_ids if codebooks.fitted_ids is not None else np.empty(0, np.int64)
    return ~np.isin(items.item_ids_N, fitted)


def _drift(items: ItemVectors, state: _State, coded: _Coded) -> Drift:
    assert state.manifest
    is_new_N, residual = _is_new(items, state.codebooks), state.codebooks.residual
    return measure_drift(
        state.codebooks,
        state.manifest.reference_mse,
        items.vectors_ND[is_new_N],
        CodesInUse(coded.seen_codes_NL, is_new_N, residual.level_sizes) if residual else None,
        age_in_days(state.manifest.last_day, items.last_day),
    )


def _decide(config: Codes, items: ItemVectors, state: _State, drift: Drift | None) -> RefitDecision:
    if drift is not None:
        return decide_refit(drift, config.refit)
    if state.manifest is None:
        reason = "there are no codebooks yet"
    elif state.manifest.encoder != items.encoder:
        reason = f"the encoder changed from {state.manifest.encoder} to {items.encoder}"
    else:
        reason = f"rq or vq settings differ from those of codebooks {state.version}"
    return RefitDecision(refit=True, reasons=(reason,))


def _keep_version(version: str, decision: RefitDecision, *, fits: bool) -> RefitDecision:
    """No refit: the recipe names its codebooks."""
    if not fits:
        raise UserError(
            f"codes.version={version} cannot code the items: {'; '.join(decision.reasons)}; name "
            "codebooks that belong to these settings and vectors, or leave codes.version out"
        )
    why = "".join(f"; otherwise: {reason}" for reason in decision.reasons)
    return RefitDecision(refit=False, reasons=(f"codes.version={version}{why}",))


def _check_room(config: Codes, num_items: int) -> None:
    if config.vq and num_items > config.vq.max_items:
        raise UserError(
            f"codes.vq.max_items={config.vq.max_items} is less than the {num_items} items that the "
            f"vq codes are made of; set it to {num_items} or more (twice that leaves room to grow)"
        )


def _check_size(config: Codes, items: ItemVectors) -> None:
    """Refuse a fit to fewer items than codewords, and say which items there are."""
    if config.rq is None:
        return
    try:
        config.rq.for_items(len(items.seen.item_ids_N))
    except ValueError as error:
        raise UserError(
            f"codes.{error}; codebooks are fitted to the {len(items.seen.item_ids_N)} of "
            f"{len(items.item_ids_N)} items with a vector that an event has shown by "
            f"{items.last_day} and that are not held out"
        ) from error


def _dense(config: Codes, items: ItemVectors) -> Float32Array | None:
    """Elements of the vectors that enter as dense features."""
    wanted, dim = config.features.vector_dims, items.vectors_ND.shape[1]
    if wanted > dim:
        raise UserError(
            f"codes.features.vector_dims={wanted} is more than the {dim} elements of the item "
            f"vectors; set it to {dim} or less"
        )
    return np.asarray(items.vectors_ND[:, :wanted], np.float32) if wanted else None


def _known(items: ItemVectors, state: _State) -> "_State | None":
    """What a refit goes on with: the newest codebooks, in the space of the day's encoder."""
    if state.manifest is None or state.manifest.encoder == items.encoder:
        return state if state.manifest else None
    earlier = items.earlier
    if earlier is None:
        return None
    rq, residual, slots = state.manifest.config.rq, None, None
    _, now, before = np.intersect1d(
        items.item_ids_N, earlier["item_id"].to_numpy(), return_indices=True
    )
    if not len(now):
        return None
    if rq:
        codes_NL = codes_of(earlier)[before]
        residual = codebooks_in_space(codes_NL, items.vectors_ND[now], rq)
    if state.codebooks.items:
        slots = restate_items(state.codebooks.items, items.item_ids_N, items.vectors_ND)
    return _State(Codebooks(residual, slots), state.manifest)


def _fit_version(
    config: Codes, items: ItemVectors, root: Path, known: _State | None, device: torch.device
) -> str:
    fitted = refit(
        config, items.item_ids_N, items.vectors_ND, known.codebooks if known else None, device
    )
    after = _encode(items, fitted.codebooks, device)
    change = None
    if known and known.codebooks.residual and config.refit.keep_meaning:
        before_NL = known.codebooks.residual.encode(items.vectors_ND, device)
        levels = min(before_NL.shape[1], after.codes_NL.shape[1])
        if levels:
            change = stability(before_NL[:, :levels], after.codes_NL[:, :levels])
    version = next_version(root)
    manifest = CodebookManifest(
        version=version,
        parent=known.version if known and config.refit.keep_meaning else None,
        fingerprint="",
        encoder=items.encoder,
        first_day=items.first_day,
        last_day=items.last_day,
        config=config,
        num_items=len(items.item_ids_N),
        dim=items.vectors_ND.shape[1],
        table_sizes=fitted.codebooks.table_sizes,
        reference_mse=fitted.reference_mse,
        metrics=after.metrics,
        stability=change,
        share_carried={name: carry.share_carried for name, carry in fitted.carries.items()},
    )
    publish_version(root, manifest, fitted.codebooks, fitted.carries)
    return version


def _suffixes(config: Codes, items: ItemVectors, coded: _Coded) -> Suffixes | None:
    if config.suffix is None:
        return None
    before, earlier = None, items.earlier
    if earlier is not None and "sid_suffix" in earlier.column_names:
        codes_NL = codes_of(earlier)
        if codes_NL.shape[1] == coded.codes_NL.shape[1]:
            ids, suffix = (earlier[name].to_numpy() for name in ("item_id", "sid_suffix"))
            before = CodedItems(ids, codes_NL, suffix)
    return tell_apart(items.item_ids_N, coded.codes_NL, config.suffix.num_codes, before)


def stability_of_items(
    earlier: pa.Table | None, item_ids_N: Int64Array, codes_NL: Int32Array
) -> Stability | None:
    """Codes of the items of both days; None where there are none to compare."""
    if earlier is None:
        return None
    before_NL = codes_of(earlier)
    _, now, before = np.intersect1d(item_ids_N, earlier["item_id"].to_numpy(), return_indices=True)
    if not len(now) or not before_NL.shape[1] or before_NL.shape[1] != codes_NL.shape[1]:
        return None
    return stability(before_NL[before], codes_NL[now])


def codes_of(table: pa.Table) -> Int32Array:
    """The RQ codes of a codes artifact; no columns where it has none."""
    levels: list[Int32Array] = []
    while f"sid_{len(levels)}" in table.column_names:
        levels.append(table[f"sid_{len(levels)}"].to_numpy())
    none = np.empty((table.num_rows, 0), np.int32)
    return np.stack(levels, axis=1) if levels else none
