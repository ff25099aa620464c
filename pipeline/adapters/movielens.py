"""MovieLens in the data contract, with the tasks `like` and `watch`.

`like` is rating >= 4, observed on rated rows. `watch` is 1 on rated rows and 0 on sampled ones:
items known by that day (rated by anyone on or before it) that the user never rated in the whole
log, drawn uniformly. A sampled row has the request and the timestamp of its positive; its `rating`
and `like` are null.

Memory is about 60 bytes a rating, besides the catalogue: 25 million ratings need about 2 GiB.
"""

from collections.abc import Iterator
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedding.errors import UserError
from embedding.raw_ids import Int64Array
from pipeline.adapters.importing import (
    ImportSummary,
    Progress,
    finished_import,
    importing,
    source_receipt,
    write_summary,
)
from pipeline.adapters.movielens_files import (
    Movie,
    Person,
    Ratings,
    Source,
    find_source,
    read_movies,
    read_ratings,
    read_tags,
    read_users,
)
from pipeline.adapters.unrated import UnratedItems
from pipeline.samples.dataset import TIMESTAMP, DayWriter

SECONDS_PER_DAY = 86_400
LIKE_HALF_STARS = 8
CHUNK_POSITIVES = 32_768
CHUNK_ITEMS = 1_024
AGE_GROUPS = (
    (56, "56+"),
    (50, "50-55"),
    (45, "45-49"),
    (35, "35-44"),
    (25, "25-34"),
    (18, "18-24"),
)
ZIP_PREFIX = 2
_EPOCH = date(1970, 1, 1)

EVENTS = pa.schema(
    [
        ("request_id", pa.int64()),
        ("user_id", pa.int64()),
        ("item_id", pa.int64()),
        ("timestamp", TIMESTAMP),
        ("rating", pa.float32()),
        ("rating_level", pa.int8()),
        ("like", pa.int8()),
        ("watch", pa.int8()),
    ]
)
ITEMS = pa.schema(
    [
        ("item_id", pa.int64()),
        ("title", pa.string()),
        ("genres", pa.list_(pa.string())),
        ("primary_genre", pa.string()),
        ("genre_set", pa.string()),
        ("year", pa.int16()),
        ("decade", pa.int16()),
        ("text", pa.string()),
        ("image", pa.binary()),
    ]
)
USERS = pa.schema(
    [
        ("user_id", pa.int64()),
        ("age", pa.int16()),
        ("age_group", pa.string()),
        ("sex", pa.string()),
        ("occupation", pa.string()),
        ("zip_prefix", pa.string()),
    ]
)


def import_movielens(
    src: Path,
    out: Path,
    *,
    negatives: int = 4,
    tags: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> ImportSummary:
    """Write MovieLens of any layout to `out`; nothing happens if that was done before.

    Columns that a layout lacks are there and null, so one recipe fits all layouts. `rating_level`
    is the rating in half stars (1 .. 10), `primary_genre` an item's least common genre.

    Args:
        src: Unpacked download.
        out: Directory to create.
        negatives: Sampled unrated items for each rating.
        tags: Add the most frequent tags of each item to its text, whatever their date: they tell
            earlier days what viewers said later.
        seed: Of the sampling.
        progress: Called with ratings done and all ratings.

    Raises:
        UserError: the source does not fit, or `out` is in use.
    """
    if negatives < 0:
        raise UserError(f"--negatives {negatives} must be 0 or more")
    source = find_source(src)
    if not tags:
        source = replace(source, tags=None)
    receipt = source_receipt("movielens", source.files, negatives=negatives, tags=tags, seed=seed)
    done = finished_import(out, receipt)
    if done is not None:
        return done
    ratings = read_ratings(source.ratings)
    movies, people = read_movies(source.movies), read_users(source.users)
    with importing(out, receipt) as scratch:
        notes: dict[str, int] = {}
        item_ids = np.union1d(ratings.items, np.array(list(movies), np.int64))
        user_ids = np.union1d(ratings.users, np.array(list(people), np.int64))
        notes["items only in ratings"] = len(item_ids) - len(movies)
        notes["users only in ratings"] = len(user_ids) - len(people)
        _write_items(scratch, item_ids, movies, source, notes)
        pq.write_table(_users(user_ids, people), scratch / "users.parquet")
        log = _EventLog(ratings, negatives, seed)
        for written in log.write(scratch):
            if progress is not None:
                progress(written, len(ratings.users))
        notes["sampled rows"] = log.num_sampled
        notes["negatives missing (too few unrated items)"] = (
            negatives * len(ratings.users) - log.num_sampled
        )
        num_likes = int((ratings.half_stars >= LIKE_HALF_STARS).sum())
        num_events = len(ratings.users) + log.num_sampled
        return write_summary(
            scratch,
            ImportSummary(
                events=num_events,
                users=len(user_ids),
                items=len(item_ids),
                days=len(log.days),
                first_day=_day_name(log.days[0]),
                last_day=_day_name(log.days[-1]),
                label_rates={
                    "like": num_likes / len(ratings.users),
                    "watch": len(ratings.users) / num_events,
                },
                notes=notes,
            ),
        )


# --- events --------------------------------------------------------------------------------------


class _EventLog:
    """Ratings and their sampled companions, day by day."""

    def __init__(self, ratings: Ratings, negatives: int, seed: int) -> None:
        self.ratings = ratings
        self.negatives = negatives
        self.seed = seed
        self.num_sampled = 0
        day_of = ratings.seconds // SECONDS_PER_DAY  # ascending, as the ratings are
        self.days, self._starts = np.unique(day_of, return_index=True)
        ids, first_at, code = np.unique(ratings.items, return_index=True, return_inverse=True)
        # Items in the order in which they become known: those known by a day are the first ones.
        first_day = day_of[first_at]
        order = np.lexsort((ids, first_day))
        rank = np.empty(len(ids), np.int64)
        rank[order] = np.arange(len(ids))
        self._ids = ids[order]
        self._first_day = first_day[order]
        self._users = np.unique(ratings.users, return_inverse=True)[1].astype(np.int64)
        self._unrated = UnratedItems(self._users, rank[code], len(ids))

    def write(self, root: Path) -> Iterator[int]:
        """Write all days; yields ratings done so far."""
        ends = np.append(self._starts[1:], len(self.ratings.users))
        for day, start, end in zip(self.days, self._starts, ends, strict=True):
            known = int(np.searchsorted(self._first_day, day, side="right"))
            rng = np.random.default_rng([self.seed, int(day)])
            with DayWriter(root, _day_name(day), EVENTS) as writer:
                for first in range(start, end, CHUNK_POSITIVES):
                    last = min(first + CHUNK_POSITIVES, end)
                    writer.write(self._events(np.arange(first, last), known, rng))
                    yield last

    def _events(self, rows_B: Int64Array, known: int, rng: np.random.Generator) -> dict[str, Any]:
        """Each rating followed by its sampled rows."""
        drawn_BK, valid_BK = self._unrated.draw(self._users[rows_B], known, self.negatives, rng)
        self.num_sampled += int(valid_BK.sum())
        is_rated = np.ones((len(rows_B), 1), bool)
        keep = np.hstack([is_rated, valid_BK])
        rated = np.hstack([is_rated, np.zeros_like(valid_BK)])[keep]
        items = np.hstack([self.ratings.items[rows_B, None], self._ids[drawn_BK * valid_BK]])[keep]
        row = np.repeat(rows_B, keep.sum(axis=1))
        half_stars = self.ratings.half_stars[row]
        timestamp = pa.array(self.ratings.seconds[row] * 1000).cast(TIMESTAMP)
        return {
            "request_id": row,
            "user_id": self.ratings.users[row],
            "item_id": items,
            "timestamp": timestamp,
            "rating": pa.array((half_stars / 2).astype(np.float32), mask=~rated),
            "rating_level": pa.array(half_stars, mask=~rated),
            "like": pa.array((half_stars >= LIKE_HALF_STARS).astype(np.int8), mask=~rated),
            "watch": rated.astype(np.int8),
        }


def _day_name(day: int) -> str:
    return (_EPOCH + timedelta(days=int(day))).isoformat()


# --- items and users -----------------------------------------------------------------------------


def _write_items(
    root: Path,
    item_ids: Int64Array,
    movies: dict[int, Movie],
    source: Source,
    notes: dict[str, int],
) -> None:
    tags = read_tags(source.tags)
    genre_counts: dict[str, int] = {}
    for movie in movies.values():
        for genre in movie.genres:
            genre_counts[genre] = genre_counts.get(genre, 0) + 1
    notes["items with genres"] = sum(bool(movie.genres) for movie in movies.values())
    notes["items with a plot text"] = sum(bool(movie.overview) for movie in movies.values())
    notes["items with tags"] = len(tags)
    with pq.ParquetWriter(root / "items.parquet", ITEMS, compression="zstd") as writer:
        for first in range(0, len(item_ids), CHUNK_ITEMS):
            ids = item_ids[first : first + CHUNK_ITEMS].tolist()
            rows = [
                _item(key, movies.get(key), tags.get(key, []), genre_counts, source) for key in ids
            ]
            posters = sum(row["image"] is not None for row in rows)
            notes["items with a poster"] = notes.get("items with a poster", 0) + posters
            writer.write_table(pa.Table.from_pylist(rows, schema=ITEMS))


def _item(
    key: int, movie: Movie | None, tags: list[str], genre_counts: dict[str, int], source: Source
) -> dict[str, Any]:
    poster = source.posters.get(key)
    if movie is not None and movie.poster:
        poster = source.ratings.parent / movie.poster
        if not poster.is_file():
            raise UserError(
                f"{source.movies}: movie {key} names the poster {movie.poster}, which is not there"
                "; add the file or empty the cell"
            )
    image = None if poster is None else poster.read_bytes()
    if movie is None:
        return {"item_id": key, "genres": [], "text": ", ".join(tags) or None, "image": image}
    said = [movie.title, movie.overview, f"Tags: {', '.join(tags)}." if tags else ""]
    return {
        "item_id": key,
        "title": movie.title,
        "genres": movie.genres,
        "primary_genre": min(movie.genres, key=lambda g: (genre_counts[g], g), default=None),
        "genre_set": "|".join(sorted(movie.genres)) or None,
        "year": movie.year,
        "decade": None if movie.year is None else movie.year // 10 * 10,
        "text": " ".join(part for part in said if part) or None,
        "image": image,
    }


def _users(user_ids: Int64Array, people: dict[int, Person]) -> pa.Table:
    rows = []
    for key in user_ids.tolist():
        person = people.get(key)
        if person is None:
            rows.append({"user_id": key})
            continue
        rows.append(
            {
                "user_id": key,
                "age": person.age,
                "age_group": next((g for age, g in AGE_GROUPS if person.age >= age), "under 18"),
                "sex": person.sex,
                "occupation": person.occupation,
                "zip_prefix": person.zip_code[:ZIP_PREFIX],
            }
        )
    return pa.Table.from_pylist(rows, schema=USERS)
