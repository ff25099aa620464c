"""Commands on published bundles."""

from pathlib import Path
from typing import Annotated

import typer


def score(
    bundle: Annotated[Path, typer.Option("--bundle", help="Published bundle directory.")],
    samples: Annotated[
        Path, typer.Option("--samples", help="Sample Parquet file or directory (a join artifact).")
    ],
    output: Annotated[Path, typer.Option("--output", help="Parquet file to write.")],
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Rows at a time.")] = 8192,
) -> None:
    """Score Parquet samples with a bundle: their keys and one probability a task.

    Keys are raw ids, int64: integers from 0 on are themselves, a string is its 63-bit hash.

    To join scores back, hash your own column: embedding.raw_ids.to_raw_ids(table["item_id"]).
    """
    from rich.console import Console

    from deploy.scoring import score_samples
    from pipeline.console import Reporter

    reporter = Reporter()
    with reporter.stage("score"):
        rows = score_samples(
            bundle, samples, output, batch_size=batch_size, progress=reporter.advance
        )
    Console(highlight=False).print(f"{rows} rows scored -> {output}")
