"""Offline scoring: sample Parquet in, keys and probabilities out, in the order of the input."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from deploy.predictor import Predictor
from embedding import samples as columns
from embedding.batch import RankingBatch
from embedding.errors import UserError
from embedding.files import require_writable
from embedding.items import NO_CONTENT
from embedding.loader import SampleFiles, SampleLoader
from pipeline.samples.join import SAMPLES


@dataclass(frozen=True)
class Scored:
    """What was scored."""

    num_rows: int
    num_without_content: int
    """Rows whose item has no content vector, where the model reads them."""


def sample_files(samples: Path) -> list[Path]:
    """The sample files of a path.

    Args:
        samples: a sample file, a join artifact, or a directory searched for `*.parquet`.

    Raises:
        UserError: there are none.
    """
    paths = [samples] if samples.is_file() else sorted(_searched(samples).rglob("*.parquet"))
    if not paths:
        raise UserError(
            f"--samples {samples} holds no Parquet file; give a join artifact's samples/ directory"
        )
    return paths


def _searched(samples: Path) -> Path:
    """Beside its samples/ an artifact may hold those of items that were kept from training."""
    return samples / SAMPLES if (samples / SAMPLES).is_dir() else samples


def require_apart(output: Path, samples: Path) -> None:
    """Refuse an output that takes the place of samples, or would be taken for some next time.

    Args:
        output: the file that is to be written.
        samples: from which `sample_files` are scored.

    Raises:
        UserError: it is one of them, or lies where they are searched.
    """
    if samples.is_file():
        is_input = output.exists() and output.samefile(samples)
    else:
        is_input = output.resolve().is_relative_to(_searched(samples).resolve())
    if is_input:
        raise UserError(
            f"--output {output} is or lies in --samples {samples}, where it would replace samples "
            "or be read as some; name a file elsewhere"
        )


def require_output(output: Path) -> None:
    """Make the folder of a file that is to be written: minutes of scoring must not end there.

    Raises:
        UserError: no file can be written there.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--output {output} cannot be written: {error}; name another file"
        ) from error
    require_writable(output)


def score_samples(
    predictor: Predictor,
    paths: Sequence[Path],
    output: Path,
    *,
    batch_size: int,
    progress: Callable[[int, int], None],
) -> Scored:
    """Score sample files and write one Parquet file in one move; an error leaves nothing behind.

    Args:
        predictor: of a published bundle.
        paths: sample files.
        output: keys, and one `probability:<task>` column a task (float32); none of `paths`.
        batch_size: rows at a time.
        progress: called with rows done and in all.

    Raises:
        UserError: A sample file cannot be used, or the output cannot be written.
    """
    require_output(output)
    _check_codebooks(predictor.bundle.codebooks, paths)
    # Labels are not read: what is scored tonight has none yet.
    files = SampleFiles(paths, predictor.schema, tasks=(), items=predictor.item_source)
    stream = SampleLoader(files, batch_size_per_rank=batch_size).sequential()
    partial = output.with_name(f".{output.name}.partial")
    done = without_content = 0
    with (
        _removed_on_error(partial),
        stream,
        pq.ParquetWriter(partial, _schema(predictor.tasks)) as writer,
    ):
        for batch in stream:
            probs_BT = predictor.predict(batch)[: batch.num_rows]
            keys = [batch.keys_BK[: batch.num_rows, k].numpy() for k in range(len(columns.KEYS))]
            scores = [probs_BT[:, t].contiguous().numpy() for t in range(len(predictor.tasks))]
            writer.write_batch(pa.record_batch([*keys, *scores], schema=_schema(predictor.tasks)))
            done += batch.num_rows
            without_content += _without_content(batch)
            progress(done, files.num_rows)
    partial.replace(output)
    return Scored(done, without_content)


@contextmanager
def _removed_on_error(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _without_content(batch: RankingBatch) -> int:
    if batch.content is None:
        return 0
    shown_B = batch.content.candidate_B[: batch.num_rows]
    return int((batch.content.rows_U[shown_B] == NO_CONTENT).sum())


def _check_codebooks(trained: str | None, paths: Sequence[Path]) -> None:
    """Code 17 of other codebooks means something else, and no score would show it."""
    if trained is None:
        return
    for path in paths:
        found = (pq.read_schema(path).metadata or {}).get(columns.CODEBOOKS, b"").decode()
        if found != trained:
            raise UserError(
                f"{path} holds codes of codebooks {found or 'that it does not name'}, and the "
                f"bundle was trained with {trained}; join these days with the run that published "
                "the bundle, or score with the bundle of the run that joined them"
            )


def _schema(tasks: list[str]) -> pa.Schema:
    return pa.schema(
        [pa.field(columns.key_column(key), pa.int64()) for key in columns.KEYS]
        + [pa.field(columns.probability_column(task), pa.float32()) for task in tasks]
    )
