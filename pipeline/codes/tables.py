"""What `braid codes` prints."""

from pathlib import Path

from rich.markup import escape
from rich.table import Table

from embedding.errors import UserError
from multimodal.codes.versions import CodebookManifest, find_version, versions
from pipeline.codes.lookup import CodesOfRun, Prefix, spelled
from pipeline.codes.paths import codebook_versions, coded_dates, codes_directory, codes_version
from pipeline.codes.report import level_rows
from pipeline.registry import require_output

_LEVELS = {
    "level": "level",
    "codes": "codes",
    "utilisation": "in use",
    "perplexity": "perplexity",
    "mse": "MSE",
    "left": "error left",
    "stable": "stable",
}


Part = Table | str
"""What is printed: tables, and lines before them (a title of a narrow table would be folded)."""


def header(run: CodesOfRun) -> str:
    """One line: whose codes these are."""
    version = run.version
    return escape(
        f"codes of {run.date}: {run.facts.num_items:,} items, codebooks {version.version} "
        f"({version.fingerprint}), fitted to {version.num_items:,} items of {version.first_day} "
        f".. {version.last_day}, encoder {version.encoder}"
    )


def level_tables(run: CodesOfRun, limit: int) -> list[Part]:
    """The levels of the codes, and the most frequent first codes."""
    parts: list[Part] = []
    rows = level_rows(run.facts)
    if rows:
        levels = _table(*_LEVELS.values())
        for row in rows:
            levels.add_row(*(row[key] for key in _LEVELS))
        parts.append(levels)
    others = [name for name in run.facts.table_sizes if name not in run.columns]
    if others:
        columns = _table("column", "codes")
        for name in others:
            columns.add_row(name, f"{run.facts.table_sizes[name]:,}")
        parts.append(columns)
    return [*parts, *_children(run, (), limit)] if rows else parts


def code_tables(run: CodesOfRun, code: str, limit: int) -> list[Part]:
    """The codes that follow a prefix, and its items.

    Raises:
        UserError: no item has it.
    """
    prefix = run.prefix(code)
    rows = run.tree.items(prefix)
    shown = rows[:limit]
    names = run.names(run.item_ids[shown].tolist())
    items = _table("item", "code", "title")
    title = _counted(f"items of {spelled(prefix)}", len(shown), len(rows))
    suffix = run.table["sid_suffix"] if "sid_suffix" in run.table.column_names else None
    for row in shown.tolist():
        own, name = names[int(run.item_ids[row])]
        code_L = run.codes[row].tolist()
        full = spelled(code_L if suffix is None else [*code_L, suffix[row].as_py()])
        items.add_row(escape(own), full, escape(name))
    return [*_children(run, prefix, limit), title, items]


def item_tables(run: CodesOfRun, item: str) -> list[Part]:
    """All codes of an item: how many items share each prefix, and its nearest items.

    Raises:
        UserError: it has no codes.
    """
    row = run.row_of(item)
    own = int(run.item_ids[row])
    parts: list[Part] = [_bold(f"{item} {run.names([own])[own][1]}".strip())]
    if run.columns:
        codes = _table("column", "code", "prefix", "items")
        code_L = run.codes[row].tolist()
        for level, name in enumerate(run.columns):
            prefix = tuple(code_L[: level + 1])
            count = len(run.tree.items(prefix))
            codes.add_row(name, str(code_L[level]), spelled(prefix), f"{count:,}")
        if "sid_suffix" in run.table.column_names:
            codes.add_row("sid_suffix", str(run.table["sid_suffix"][row].as_py()), "", "")
        parts.append(codes)
    slots = run.slots(row)
    if slots is not None:
        found = run.neighbours(row)
        names = run.names(found)
        near = _table("vq code", "item", "title")
        for slot, other in zip(slots, found, strict=True):
            near.add_row(str(slot), *map(escape, names[other]))
        parts += [_bold("nearest items"), near]
    return parts


def _children(run: CodesOfRun, prefix: Prefix, limit: int) -> list[Part]:
    """The codes that follow a prefix; nothing behind the last level."""
    if len(prefix) == len(run.columns):
        return []
    children = run.children(prefix)
    shown = list(children.items())[:limit]
    table = _table("code", "items")
    what = f"codes that follow {spelled(prefix)}" if prefix else "first codes"
    for code, count in shown:
        table.add_row(spelled((*prefix, code)), f"{count:,}")
    return [_counted(what, len(shown), len(children)), table]


def _counted(what: str, shown: int, there: int) -> str:
    return _bold(f"{what} ({there:,})" if shown == there else f"{what} ({shown:,} of {there:,})")


def _bold(text: str) -> str:
    return f"[bold]{escape(text)}[/]"


# --- versions ------------------------------------------------------------------------------------


def versions_table(out: Path) -> Table:
    """All codebook versions, oldest first.

    Raises:
        UserError: there are none.
    """
    require_output(out)
    known = versions(codebook_versions(out))
    if not known:
        raise UserError(
            f"--out {out} holds no codebooks; give the recipe a section codes, and run "
            f"`braid run --out {out} ...`"
        )
    dates = [(date, codes_version(codes_directory(out, date))) for date in coded_dates(out)]
    table = _table(
        *("version", "parent", "days", "items", "collisions", "error left", "kept"),
        *("fingerprint", "runs"),
    )
    for manifest in known:
        runs = [date for date, version in dates if version == manifest.version]
        table.add_row(
            manifest.version,
            manifest.parent or "-",
            f"{manifest.first_day} .. {manifest.last_day}",
            f"{manifest.num_items:,}",
            *_figures(manifest),
            manifest.fingerprint,
            _runs(runs),
        )
    return table


def version_tables(out: Path, version: str) -> list[Part]:
    """One version: what it is made of, and its levels.

    Raises:
        UserError: there is no such version.
    """
    require_output(out)
    manifest = find_version(codebook_versions(out), version)
    collisions, left, kept = _figures(manifest)
    about = _table("codebooks", manifest.version)
    held_out = manifest.reference_mse
    facts = {
        "goes on with": manifest.parent or "-",
        "fitted to": f"{manifest.num_items:,} items of {manifest.first_day} .. {manifest.last_day}",
        "encoder": manifest.encoder,
        "dimensions": str(manifest.dim),
        "collisions": collisions,
        "error left": left,
        "MSE of held-out items": "-" if held_out is None else f"{held_out:.4g}",
        "codes kept": kept,
        "codes": ", ".join(f"{name} {size:,}" for name, size in manifest.table_sizes.items()),
        "carried": ", ".join(f"{n} {share:.1%}" for n, share in manifest.share_carried.items()),
        "fingerprint": manifest.fingerprint,
        "written": manifest.created_at,
    }
    for name, value in facts.items():
        about.add_row(name, escape(value))
    if manifest.metrics is None:
        return [about]
    levels = _table("level", "codes", "in use", "perplexity", "MSE")
    for level, metrics in enumerate(manifest.metrics.levels):
        levels.add_row(
            f"sid_{level}",
            f"{metrics.num_codes:,}",
            f"{metrics.utilisation:.1%}",
            f"{metrics.perplexity:,.1f}",
            f"{metrics.mse:.4g}",
        )
    return [about, levels]


def _figures(manifest: CodebookManifest) -> tuple[str, str, str]:
    """Collisions, error left of the last level, and codes kept since the parent."""
    metrics, stability = manifest.metrics, manifest.stability
    kept = "-" if stability is None else f"{stability.full:.1%}"
    if metrics is None:
        return "-", "-", kept
    whole = metrics.mean_squared_length
    left = f"{metrics.levels[-1].mse / whole:.1%}" if whole else "-"
    return f"{metrics.collision_rate:.1%}", left, kept


def _runs(dates: list[str]) -> str:
    if not dates:
        return "-"
    return dates[0] if len(dates) == 1 else f"{dates[0]} .. {dates[-1]} ({len(dates)})"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold")
    return table
