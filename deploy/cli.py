"""Commands that write and read bundles."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def score(
    bundle: Annotated[Path, typer.Option("--bundle", help="Published bundle directory.")],
    samples: Annotated[
        Path, typer.Option("--samples", help="Sample Parquet file or directory (a join artifact).")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Parquet file to write.")],
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Rows at a time.")] = 8192,
    items: Annotated[
        Path | None,
        typer.Option(
            "--items",
            help="Catalogue (like items.parquet) whose items the bundle may not know: their text "
            "and images are encoded first.",
        ),
    ] = None,
) -> None:
    """Score Parquet samples with a bundle: their keys and one probability a task.

    Keys are raw ids, int64: integers from 0 on are themselves, a string is its 63-bit hash.

    To join scores back, hash your own column: embedding.raw_ids.to_raw_ids(table["item_id"]).
    """
    import logging

    from rich.console import Console
    from rich.markup import escape

    from deploy.predictor import Predictor
    from deploy.scoring import require_apart, require_output, sample_files, score_samples
    from pipeline.console import Reporter

    reporter, console = Reporter(), Console(highlight=False, soft_wrap=True)
    paths = sample_files(samples)
    require_apart(output, samples)
    require_output(output)
    # TorchRec asks torch something by a name that torch has renamed, and torch says so.
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    predictor = Predictor(bundle)
    if items is not None:
        from deploy.new_items import encode_new_items  # transformers: seconds, for new items only

        with reporter.stage("encode", "items"):
            new = encode_new_items(predictor, items, reporter.advance)
        predictor = predictor.with_added(new.items)
        console.print(escape(f"{items}: {new}"))
    with reporter.stage("score"):
        scored = score_samples(
            predictor, paths, output, batch_size=batch_size, progress=reporter.advance
        )
    console.print(escape(f"{scored.num_rows} rows scored -> {output}"))
    if scored.num_without_content:
        console.print(
            f"{scored.num_without_content} of them show an item without a content vector; "
            "--items FILE gives one to every item of a catalogue"
        )


def export(
    out: Annotated[Path, typer.Option("--out", "-o", help="Output directory of the run.")],
    date: Annotated[str, typer.Option("--date", "-d", help="Day the model was trained up to.")],
    to: Annotated[Path, typer.Option("--to", help="Folder to write: not there yet, or empty.")],
    tables: Annotated[
        Literal["fp32", "int8"] | None,
        typer.Option(
            "--tables",
            help="Embedding tables as trained, or in 8 bits an element; default: publish.tables of "
            "the recipe that the day was run with.",
        ),
    ] = None,
) -> None:
    """Write the bundle of a trained day into a folder, whatever the gate says.

    It is the bundle that `braid run` publishes, unless --tables differs: tables, dense weights, and
    the content encoder with LoRA merged. What is published and in production stays as it is.
    """
    from rich.console import Console
    from rich.markup import escape

    from deploy.export import export_bundle

    console = Console(highlight=False, soft_wrap=True)
    exported = export_bundle(out, date, to, tables)
    for reason in exported.refused:
        console.print(f"[yellow]![/] the gate refused this model: {escape(reason)}")
    if not exported.is_judged:
        console.print("[yellow]![/] no gate has looked at this model")
    console.print(
        escape(
            f"{to}: bundle of {date}, {exported.num_rows} table rows in {exported.tables}, "
            f"{exported.num_bytes / 2**20:.1f} MiB; score with braid score --bundle {to}"
        )
    )
