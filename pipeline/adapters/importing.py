"""What all adapters share: finding the source, the receipt, the summary, errors with a place."""

import csv
import gzip
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal, cast

import pyarrow as pa
import pyarrow.csv as pa_csv

from embedding.config import StrictConfig
from embedding.errors import UserError
from pipeline.days import fingerprint
from pipeline.samples.dataset import is_written, writing_dataset

RECEIPT = "import.json"
SUMMARY = "import_summary.json"
ADAPTER_VERSION = 1
BLOCK_BYTES = 16 << 20

Progress = Callable[[int, int], None]


class ImportReceipt(StrictConfig):
    """`import.json`: what was asked for, and of which files; version 1."""

    schema_version: Literal[1] = 1
    command: str
    version: int = ADAPTER_VERSION
    """Of the adapters."""
    options: dict[str, Any]
    source: str
    """Fingerprint of the files."""


class ImportSummary(StrictConfig):
    """`import_summary.json`: what an import wrote; version 1."""

    schema_version: Literal[1] = 1
    events: int
    users: int
    """Rows of users.parquet; 0 where the dataset has none."""
    items: int
    """Rows of items.parquet; 0 where the dataset has none."""
    days: int
    first_day: str
    last_day: str
    label_rates: dict[str, float]
    """Share of ones among the rows where a task is observed."""
    notes: dict[str, int] = {}
    """What was filled in or left out, counted."""


def source_receipt(command: str, files: Sequence[Path], **options: Any) -> ImportReceipt:
    """Identity of an import."""
    return ImportReceipt(command=command, options=options, source=fingerprint(files))


def finished_import(out: Path, receipt: ImportReceipt) -> ImportSummary | None:
    """The summary of the same import done before, or None where there is none.

    Raises:
        UserError: `out` holds something else.
    """
    if not is_written(out, RECEIPT, receipt):
        return None
    return ImportSummary.model_validate_json((out / SUMMARY).read_text())


@contextmanager
def importing(out: Path, receipt: ImportReceipt) -> Iterator[Path]:
    """Scratch directory that becomes `out`; write the summary with `write_summary`.

    Raises:
        UserError: Another process finished the same import in the meantime.
    """
    with writing_dataset(out, RECEIPT, receipt) as scratch:
        if scratch is None:
            raise UserError(
                f"{out} was written by another import while this one waited for it; run the same "
                "command again to see its summary"
            )
        yield scratch


def write_summary(scratch: Path, summary: ImportSummary) -> ImportSummary:
    """Keep the summary beside the data, for the next time the same import is asked for."""
    (scratch / SUMMARY).write_text(summary.model_dump_json(indent=2))
    return summary


def require_directory(src: Path) -> None:
    """Refuse a source that is not a directory.

    Raises:
        UserError: it is not.
    """
    if not src.is_dir():
        raise UserError(f"--src {src} is not a directory; unpack the download and name its folder")


# --- delimited text ------------------------------------------------------------------------------


def header_of(path: Path) -> list[str]:
    """Column names in the first line.

    Raises:
        UserError: the file is empty.
    """
    with path.open("rb") as raw, _unpacked(raw, path) as file:
        line = file.readline().decode("utf-8-sig", "replace")
    names = next(csv.reader([line]), [])
    if not names:
        raise UserError(f"{path} is empty; download it again")
    return [name.strip() for name in names]


def stream_table(
    path: Path,
    types: dict[str, pa.DataType],
    *,
    delimiter: str,
    header: Sequence[str] | None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[pa.RecordBatch]:
    """Batches of the columns in `types`, in bounded memory.

    Args:
        path: Delimited text, plain or .gz.
        types: Wanted columns.
        delimiter: One character.
        header: Names of all columns where the file has none; None: the first line names them.
        progress: Called with the bytes of the file read so far.

    Raises:
        UserError: a line does not fit; the message names file, line and value.
    """
    read = pa_csv.ReadOptions(
        column_names=None if header is None else list(header),
        block_size=BLOCK_BYTES,
        use_threads=False,
    )
    convert = pa_csv.ConvertOptions(
        column_types=types, include_columns=list(types), strings_can_be_null=True
    )
    # A quote is text in the formats without header.
    parse = pa_csv.ParseOptions(delimiter=delimiter, quote_char='"' if header is None else False)
    try:
        with path.open("rb") as raw, _unpacked(raw, path) as file:
            for batch in pa_csv.open_csv(
                file, read_options=read, parse_options=parse, convert_options=convert
            ):
                yield batch
                if progress is not None:
                    progress(raw.tell())
    except (pa.ArrowException, OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{path}: {str(error).splitlines()[0]}; correct that line, or download the file again"
        ) from error


def count_lines(path: Path, progress: Callable[[int], None] | None = None) -> int:
    """Lines of a text file, plain or .gz; a last line without line break counts.

    Raises:
        UserError: the file cannot be unpacked.
    """
    lines, last = 0, b"\n"
    try:
        with path.open("rb") as raw, _unpacked(raw, path) as file:
            while chunk := file.read(1 << 22):
                lines += chunk.count(b"\n")
                last = chunk[-1:]
                if progress is not None:
                    progress(raw.tell())
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be unpacked ({error}); download it again") from error
    return lines + (last != b"\n")


def _unpacked(raw: IO[bytes], path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(raw)) if path.suffix == ".gz" else raw


def refuse_nulls(path: Path, batch: pa.RecordBatch, first_line: int) -> None:
    """Every column of the batch must be filled in.

    Raises:
        UserError: names file, line and column.
    """
    for name in batch.schema.names:
        column = batch.column(name)
        if column.null_count:
            at = column.is_null().to_numpy(zero_copy_only=False).argmax()
            raise UserError(
                f"{path}, line {first_line + int(at)}: column {name!r} is empty; fill it in or "
                "remove the line"
            )


def text_lines(path: Path) -> list[str]:
    """Lines of a small text file: UTF-8, or Latin-1 as in GroupLens' older files."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    return text.replace("\r\n", "\n").split("\n")


def split_lines(path: Path, delimiter: str, at_least: int) -> Iterator[tuple[int, list[str]]]:
    """Number and cells of every line of a small text file.

    Raises:
        UserError: a line has fewer than `at_least` cells.
    """
    for number, line in enumerate(text_lines(path), 1):
        if not line.strip():
            continue
        cells = line.rstrip("\r\n").split(delimiter)
        if len(cells) < at_least:
            raise UserError(
                f"{path}, line {number}: {line[:60]!r} has {len(cells)} cells but needs {at_least}"
                f", separated by {delimiter!r}; download the file again"
            )
        yield number, cells


def to_int(text: str, path: Path, line: int, column: str, *, bits: int = 64) -> int:
    """An integer of a cell, as large as `bits` and a sign allow.

    Raises:
        UserError: it is none.
    """
    try:
        number = int(text)
    except ValueError:
        number = None
    if number is None or number.bit_length() >= bits:
        raise UserError(
            f"{path}, line {line}: column {column!r} is {text!r} but must be an integer of {bits} "
            "bits; correct that line, or download the file again"
        )
    return number


def csv_rows(
    reader: "csv.DictReader[str]", path: Path, needed: Sequence[str]
) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and cells of every row of a small CSV file.

    Raises:
        UserError: a row ends before a column in `needed`, or is no CSV.
    """
    try:
        for row in reader:
            lacking = [name for name in needed if row[name] is None]
            if lacking:
                raise UserError(
                    f"{path}, line {reader.line_num}: the row ends before its column {lacking[0]!r}"
                    "; correct that line, or download the file again"
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise UserError(
            f"{path}, line {reader.line_num}: {error}; correct that line, or download the file "
            "again"
        ) from error
