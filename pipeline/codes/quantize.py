"""Codes of all items of a day: with yesterday's codebooks, or with new ones that go on with them.

Reads item vectors and the versions of the codebooks. Writes `codes.parquet` (item_id, sid_0, ...,
optional sid_suffix and vq) and, on a refit, a new codebook version.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedding.errors import UserError
from embedding.raw_ids import Int64Array
from embedding.samples import CODEBOOKS
from multimodal.codes.config import Codes
from multimodal.codes.figures import CodeMetrics, Drift, RefitDecision, Stability
from multimodal.codes.metrics import measure_codes, stability
from multimodal.codes.refit import (
    CodesInUse,
    age_in_days,
    decide_refit,
    measure_drift,
    refit,
)
from multimodal.codes.residual_fit import codebooks_in_space
from multimodal.codes.store import Codebooks
from multimodal.codes.tree import CodedItems, Suffixes, tell_apart
from multimodal.codes.vector_quantizer import restate_items
from multimodal.codes.vectors import Float32Array, Int32Array, mean_cosine
from multimodal.codes.versions import (
    CodebookManifest,
    find_version,
    load_version,
    next_version,
    publish_version,
)
from pipeline.codes.encode_items import HERE, Books, DayEncoder, Encoded, Machines
from pipeline.codes.features import CODES_FILE, NearItems, codes_table
from pipeline.codes.item_vectors import ItemVectors
from pipeline.codes.kept_codes import write_digests
from pipeline.codes.quantize_facts import Quantized


def quantize(
    config: Codes,
    items: ItemVectors,
    root: Path,
    scratch: Path,
    *,
    force_refit: bool = False,
    machines: Machines = HERE,
) -> Quantized:
    """Write the codes of a day into `scratch`, and new codebooks into `root` where they are due.

    Args:
        config: the recipe's codes.
        items: all items of the day.
        root: directory of the codebook versions.
        scratch: an existing directory.
        force_refit: fit anew whatever the policy says.
        machines: where codes are looked up, and codebooks fitted.

    Raises:
        UserError: unusable vectors, unknown or damaged codebooks, or codebooks that belong to other
            settings.
    """
    _ = items.digests  # refuses NaN before anything is fitted
    _check_dims(config, items)
    state = _State.read(root, config.version or items.version)
    encoder = DayEncoder(config, items, scratch, machines)
    coded = None
    if state.fits(config, items):
        found = encoder.encode(state.books, with_vq=False)
        coded = _measure(encoder, state.codebooks, found)
    drift = _drift(items.seen, state, coded) if coded else None
    decision = _decide(config, items, state, drift)
    if force_refit and not decision.refit:
        decision = RefitDecision(refit=True, reasons=("asked for",))
    if config.version:
        decision = _keep_version(config.version, decision, fits=coded is not None)
    cosine = mean_cosine(items.seen.vectors_ND)
    if decision.refit:
        known = _known(items, state)
        # Slots of items that are gone stay, where slots keep their meaning.
        slots = _num_slots(known) if config.refit.keep_meaning else 0
        _check_room(config, max(len(items.seen.item_ids_N), slots))
        _check_size(config, items)
        before = coded if known is state else None
        state, found, coded = _fit_version(encoder, root, known, before)
    else:
        _check_room(config, _num_slots(state))
        found = encoder.encode(state.books, with_rq=False)
    assert coded
    suffixes = _suffixes(config, items, coded)
    near = None
    if config.vq:
        book = state.codebooks.items
        assert book
        assert found.near_Bk is not None
        near = NearItems(book.slots_of(items.item_ids_N), found.near_Bk)
    table = codes_table(
        items.item_ids_N,
        coded.codes_NL,
        suffixes.suffix_N if suffixes else None,
        near,
        _dense(config, items),
    )
    table = table.replace_schema_metadata({CODEBOOKS: state.books.name})
    pq.write_table(table, scratch / CODES_FILE, compression="zstd")
    write_digests(scratch, items.item_ids_N, items.digests, state.books.name, config.vq)
    return Quantized(
        version=state.version,
        codebooks=state.books.name,
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
        num_encoded=encoder.num_encoded,
    )


@dataclass(frozen=True)
class _State:
    """The codebooks in use."""

    codebooks: Codebooks
    manifest: CodebookManifest | None
    directory: Path | None = None

    @classmethod
    def read(cls, root: Path, version: str | None) -> "_State":
        if version is None:
            return cls(Codebooks(), None)
        return cls(load_version(root, version), find_version(root, version), root / version)

    @property
    def version(self) -> str:
        assert self.manifest
        return self.manifest.version

    @property
    def books(self) -> Books:
        """For looking codes up."""
        assert self.manifest
        name = f"{self.version}-{self.manifest.fingerprint}"
        return Books(self.codebooks, name, self.directory)

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


def _measure(encoder: DayEncoder, codebooks: Codebooks, found: Encoded) -> _Coded:
    items, codes_NL = encoder.items, found.codes_BL
    if codebooks.residual is None or codes_NL is None:
        none = np.empty((len(items.item_ids_N), 0), np.int32)
        return _Coded(none, None, none)
    seen = items.seen
    of_seen = codes_NL if seen is items else codes_NL[items.seen_N]
    metrics = measure_codes(seen.vectors_ND, of_seen, codebooks.residual, device=encoder.device)
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
        items.vectors_ND,
        CodesInUse(coded.seen_codes_NL, is_new_N, residual.level_sizes if residual else ()),
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


def _check_dims(config: Codes, items: ItemVectors) -> None:
    wanted, dim = config.features.vector_dims, items.vectors_ND.shape[1]
    if wanted > dim:
        raise UserError(
            f"codes.features.vector_dims={wanted} is more than the {dim} elements of the item "
            f"vectors; set it to {dim} or less"
        )


def _dense(config: Codes, items: ItemVectors) -> Float32Array | None:
    """Elements of the vectors that enter as dense features."""
    wanted = config.features.vector_dims
    return np.asarray(items.vectors_ND[:, :wanted], np.float32) if wanted else None


def _num_slots(state: "_State | None") -> int:
    """Of the VQ codebook; 0 without one."""
    return state.codebooks.items.num_codes if state and state.codebooks.items else 0


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
    encoder: DayEncoder, root: Path, known: _State | None, before: _Coded | None
) -> tuple[_State, Encoded, _Coded]:
    """New codebooks, published, and the codes that they give.

    Args:
        encoder: of the day.
        root: directory of the versions.
        known: the codebooks that these go on with.
        before: codes that they give, where they have been looked up.
    """
    config, seen = encoder.config, encoder.items.seen
    fitted = refit(
        config,
        seen.item_ids_N,
        seen.vectors_ND,
        known.codebooks if known else None,
        encoder.device,
    )
    found = encoder.encode(Books(fitted.codebooks))
    coded = _measure(encoder, fitted.codebooks, found)
    change = None
    if known and known.codebooks.residual and config.refit.keep_meaning:
        before_NL = before.seen_codes_NL if before is not None else None
        if before_NL is None:
            before_NL = known.codebooks.residual.encode(seen.vectors_ND, encoder.device)
        levels = min(before_NL.shape[1], coded.seen_codes_NL.shape[1])
        if levels:
            change = stability(before_NL[:, :levels], coded.seen_codes_NL[:, :levels])
    version = next_version(root)
    manifest = CodebookManifest(
        version=version,
        parent=known.version if known and config.refit.keep_meaning else None,
        fingerprint="",
        encoder=seen.encoder,
        first_day=seen.first_day,
        last_day=seen.last_day,
        config=config,
        num_items=len(seen.item_ids_N),
        dim=seen.vectors_ND.shape[1],
        table_sizes=fitted.codebooks.table_sizes,
        reference_mse=fitted.reference_mse,
        metrics=coded.metrics,
        stability=change,
        share_carried={name: carry.share_carried for name, carry in fitted.carries.items()},
    )
    publish_version(root, manifest, fitted.codebooks, fitted.carries)
    return _State.read(root, version), found, coded


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
