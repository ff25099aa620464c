"""Frappe (apps used in context) in the data contract.

    frappe_ctr.parquet               labelled rows with app columns
    train.csv, valid.csv, test.csv   labelled rows, split already
    frappe.csv                       uses only (tabs, `cnt`): each gets two apps the user never used
    meta.csv                         optional: names and descriptions of the apps (tabs)

The log has no times. Three pseudo-days hold a reproducible random 7:2:1 split (or the files' own):
2015-01-01 train, -02 validation, -03 test. All rows of one bear its midnight, so that no history
within a day can be made up.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from embedding.errors import UserError
from pipeline.adapters.importing import (
    ImportSummary,
    Progress,
    finished_import,
    importing,
    require_directory,
    source_receipt,
    write_summary,
)
from pipeline.adapters.unrated import UnratedItems
from pipeline.days import parse_day
from pipeline.samples.dataset import TIMESTAMP, DayWriter

CONTEXT = ("daytime", "weekday", "isweekend", "homework", "cost", "weather", "country", "city")
APP = ("category", "downloads", "developer", "language", "price", "rating")
DAYS = ("2015-01-01", "2015-01-02", "2015-01-03")
SPLIT = (0.7, 0.9)
SPLIT_FILES = ("train.csv", "valid.csv", "test.csv")
NEGATIVES = 2
MS_PER_DAY = 86_400_000
_EPOCH = parse_day("1970-01-01", "epoch")

EVENTS = pa.schema(
    [
        ("request_id", pa.int64()),
        ("user_id", pa.int64()),
        ("item_id", pa.int64()),
        ("timestamp", TIMESTAMP),
        *((name, pa.string()) for name in CONTEXT),
        ("use", pa.int8()),
    ]
)


def import_frappe(
    src: Path, out: Path, *, seed: int = 0, progress: Progress | None = None
) -> ImportSummary:
    """Write Frappe to `out`; nothing happens if that was done before. The task is `use`.

    Args:
        src: Folder of the download.
        out: Directory to create.
        seed: Of the split, and of the sampling where the source has uses only.
        progress: Called with rows written and all rows.

    Raises:
        UserError: the source does not fit, or `out` is in use.
    """
    require_directory(src)
    files = _source_files(src)
    meta = src / "meta.csv"
    sources = [*files, *([meta] if meta.is_file() else [])]
    receipt = source_receipt("frappe", sources, seed=seed)
    done = finished_import(out, receipt)
    if done is not None:
        return done
    rng = np.random.default_rng(seed)
    log, day = _read_log(files, rng)
    with importing(out, receipt) as scratch:
        written = 0
        for index, name in enumerate(DAYS):
            rows = np.flatnonzero(day == index)
            with DayWriter(scratch, name, EVENTS) as writer:
                writer.write(_events(log, rows, name))
            written += len(rows)
            if progress is not None:
                progress(written, log.num_rows)
        items = _items(log, meta if meta.is_file() else None)
        pq.write_table(items, scratch / "items.parquet")
        return write_summary(
            scratch,
            ImportSummary(
                events=log.num_rows,
                users=0,
                items=items.num_rows,
                days=len(DAYS),
                first_day=DAYS[0],
                last_day=DAYS[-1],
                label_rates={"use": float(pc.mean(log["label"]).as_py())},
                notes={"items with a text": items.num_rows - items["text"].null_count},
            ),
        )


def _source_files(src: Path) -> list[Path]:
    for names in (("frappe_ctr.parquet",), SPLIT_FILES, ("frappe.csv",)):
        if all((src / name).is_file() for name in names):
            return [src / name for name in names]
    raise UserError(
        f"--src {src} holds no Frappe: neither frappe_ctr.parquet, nor {', '.join(SPLIT_FILES)}, "
        "nor frappe.csv is there (libfm files do not name their columns and cannot be read)"
    )


def _read_log(files: list[Path], rng: np.random.Generator) -> tuple[pa.Table, Any]:
    """All rows with int64 user, item and label, string context; and the split each belongs to."""
    tables = [_read(path) for path in files]
    log = pa.concat_tables([table.select(tables[0].column_names) for table in tables])
    if "label" not in log.column_names:
        log = _with_negatives(log, rng)
    if len(files) > 1:
        return log, np.repeat(np.arange(len(files)), [table.num_rows for table in tables])
    place = np.empty(log.num_rows, np.int64)
    place[rng.permutation(log.num_rows)] = np.arange(log.num_rows)
    return log, np.searchsorted(np.array(SPLIT) * log.num_rows, place, side="right")


def _read(path: Path) -> pa.Table:
    try:
        if path.suffix == ".parquet":
            table = pq.read_table(path)
        else:
            with path.open() as file:
                delimiter = "\t" if "\t" in file.readline() else ","
            table = pa_csv.read_csv(path, parse_options=pa_csv.ParseOptions(delimiter=delimiter))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}; download it again") from error
    names = table.column_names
    wanted = ["user", "item", *CONTEXT]
    missing = [name for name in wanted if name not in names]
    if not {"label", "cnt"} & set(names):
        missing.append("label")
    if missing:
        raise UserError(f"{path}: the columns {missing} are not among {names}; name them")
    if not table.num_rows:
        raise UserError(f"{path} has no row; download it again")
    kept = [*wanted, *(name for name in ("label", *APP) if name in names)]
    kinds = [pa.int64(), pa.int64(), *[pa.string()] * len(CONTEXT)]
    kinds += [pa.int64() if name == "label" else pa.string() for name in kept[len(kinds) :]]
    try:
        table = table.select(kept).cast(pa.schema(list(zip(kept, kinds, strict=True))))
    except pa.ArrowException as error:
        raise UserError(f"{path}: {error}; user, item and label must be integers") from error
    return _checked(table, path)


def _checked(table: pa.Table, path: Path) -> pa.Table:
    for name in ("user", "item", "label"):
        if name in table.column_names and table[name].null_count:
            row = int(table[name].is_null().to_numpy().argmax())
            raise UserError(f"{path}, row {row}: column {name!r} is empty; fill it in")
    if "label" in table.column_names:
        labels = table["label"].to_numpy()
        if labels.min() == -1:  # some releases write -1 for 0
            labels = np.where(labels == -1, 0, labels)
        wrong = ~np.isin(labels, (0, 1))
        if wrong.any():
            row = int(wrong.argmax())
            raise UserError(f"{path}, row {row}: label {labels[row]} must be 0 or 1; correct it")
        at = table.column_names.index("label")
        table = table.set_column(at, "label", pa.array(labels, pa.int64()))
    return table


def _with_negatives(log: pa.Table, rng: np.random.Generator) -> pa.Table:
    """Each use, and the same context with apps that the user never used."""
    ids, items = np.unique(log["item"].to_numpy(), return_inverse=True)
    users = np.unique(log["user"].to_numpy(), return_inverse=True)[1]
    drawn, valid = UnratedItems(users, items, len(ids)).draw(users, len(ids), NEGATIVES, rng)
    rows = np.repeat(np.arange(log.num_rows), valid.sum(axis=1))
    negatives = log.take(rows)
    negatives = negatives.set_column(1, "item", pa.array(ids[drawn[valid]], pa.int64()))
    ones = pa.array(np.ones(log.num_rows, np.int64))
    zeros = pa.array(np.zeros(len(rows), np.int64))
    return pa.concat_tables(
        [log.append_column("label", ones), negatives.append_column("label", zeros)]
    )


def _events(log: pa.Table, rows: Any, day: str) -> dict[str, Any]:
    midnight = (parse_day(day, day) - _EPOCH).days * MS_PER_DAY
    part = log.take(rows)
    return {
        "request_id": rows,
        "user_id": part["user"],
        "item_id": part["item"],
        "timestamp": pa.array(np.full(len(rows), midnight)).cast(TIMESTAMP),
        "use": part["label"].cast(pa.int8()),
        **{name: part[name] for name in CONTEXT},
    }


# --- items ---------------------------------------------------------------------------------------


def _items(log: pa.Table, meta: Path | None) -> pa.Table:
    """One row an app: side information from the log where it has it, else from meta.csv."""
    ids, first = np.unique(log["item"].to_numpy(), return_index=True)
    described = None if meta is None else _read_meta(meta)
    if described is not None:
        ids = np.union1d(ids, described["item"].to_numpy())
    columns: dict[str, Any] = {"item_id": ids}
    known = log.take(first)
    for name in APP:
        values = _lookup(described, name, ids)
        if name in known.column_names:
            values = pc.coalesce(_lookup(known, name, ids), values)
        columns["app_rating" if name == "rating" else name] = values
    columns["name"] = _known(_lookup(described, "name", ids))
    description = _known(_lookup(described, "description", ids))
    both = pc.binary_join_element_wise(columns["name"], description, ". ")
    columns["text"] = pc.coalesce(both, columns["name"], description)
    columns["image"] = pa.nulls(len(ids), pa.binary())
    return pa.table(columns)


def _lookup(table: pa.Table | None, name: str, ids: Any) -> pa.Array:
    """A string column of the rows of `ids`; null where there is none."""
    if table is None or name not in table.column_names:
        return pa.nulls(len(ids), pa.string())
    at = pc.index_in(pa.array(ids), value_set=table["item"].combine_chunks())
    return table[name].combine_chunks().take(at)


def _known(texts: pa.Array) -> pa.Array:
    """The placeholder `unknown` is no text."""
    return pc.if_else(pc.equal(texts, "unknown"), pa.scalar(None, pa.string()), texts)


def _read_meta(path: Path) -> pa.Table:
    parse = pa_csv.ParseOptions(delimiter="\t", quote_char=False)
    strings = dict.fromkeys(("name", "description", *APP), pa.string())
    convert = pa_csv.ConvertOptions(
        column_types={"item": pa.int64(), **strings},
        include_columns=["item", *strings],
        strings_can_be_null=True,
    )
    try:
        return pa_csv.read_csv(path, parse_options=parse, convert_options=convert)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}; download it again") from error
