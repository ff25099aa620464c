"""Reads every layout in which GroupLens publishes MovieLens, and the CSV layout with plot texts.

    100K            u.data (tabs), u.item, u.user (pipes, Latin-1)
    1M, 10M         ratings.dat, movies.dat, users.dat, tags.dat (`::`)
    20M, 25M, latest  ratings.csv, movies.csv, tags.csv (camelCase headers, half stars)
    with plots      ratings.csv, items.csv (genre flags, overview, poster), users.csv

Users, tags, plot texts and posters (`posters/<id>.jpg`) are each optional in all of them; an
`items.csv`, `users.csv` or `tags.csv` beside the ratings of any layout is read instead of its own.
"""

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedding.errors import UserError
from embedding.raw_ids import Int64Array
from pipeline.adapters.importing import (
    csv_rows,
    header_of,
    refuse_nulls,
    require_directory,
    split_lines,
    stream_table,
    text_lines,
    to_int,
)

Int8Array = np.ndarray[Any, np.dtype[np.int8]]

GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary",
    "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi",
    "Thriller", "War", "Western",
)  # fmt: skip
GENRE_NAMES = {"Children's": "Children", "FilmNoir": "Film-Noir", "SciFi": "Sci-Fi"}
NO_GENRE = {"unknown", "genre_unknown", "(no genres listed)", ""}
OCCUPATIONS_1M = (
    "other", "educator", "artist", "clerical", "student", "customer service", "doctor", "executive",
    "farmer", "homemaker", "k-12 student", "lawyer", "programmer", "retired", "sales", "scientist",
    "self-employed", "technician", "tradesman", "unemployed", "writer",
)  # fmt: skip
ITEM_FLAG_COLUMNS = {
    "genre_unknown", "Action", "Adventure", "Animation", "Children", "Comedy", "Crime",
    "Documentary", "Drama", "Fantasy", "FilmNoir", "Horror", "Musical", "Mystery", "Romance",
    "SciFi", "Thriller", "War", "Western",
}  # fmt: skip
RATING_ALIASES = {
    "user": ("userId", "user_id"),
    "item": ("movieId", "movie_id"),
    "rating": ("rating",),
    "timestamp": ("timestamp", "unix_timestamp"),
}
TAGS_PER_ITEM = 20
_YEAR_10000 = 253_402_300_800
"""Seconds since 1970."""
YEAR_IN_TITLE = re.compile(r"\((\d{4})\)\s*$")
POSTER_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass
class Movie:
    """What the files say about one film."""

    title: str
    genres: list[str]
    year: int | None = None
    overview: str = ""
    poster: str | None = None
    """Path relative to the source."""


@dataclass(frozen=True)
class Ratings:
    """The whole log, one entry a rating, in the order of time, user, item."""

    users: Int64Array
    items: Int64Array
    half_stars: Int8Array
    """Rating times two: 1 .. 10."""
    seconds: Int64Array
    """Since the epoch."""


@dataclass
class Source:
    """Files of one layout."""

    ratings: Path
    movies: Path | None = None
    users: Path | None = None
    tags: Path | None = None
    posters: dict[int, Path] = field(default_factory=dict)

    @property
    def files(self) -> list[Path]:
        """All files that are read."""
        named = [self.ratings, self.movies, self.users, self.tags]
        return [path for path in (*named, *self.posters.values()) if path is not None]


def find_source(src: Path) -> Source:
    """Recognise the layout of a directory, or of the one folder in it.

    Raises:
        UserError: there are no ratings.
    """
    require_directory(src)
    layouts = (
        ("u.data", ("items.csv", "u.item"), ("users.csv", "u.user"), ("tags.csv",)),
        (
            "ratings.dat",
            ("items.csv", "movies.dat"),
            ("users.csv", "users.dat"),
            ("tags.csv", "tags.dat"),
        ),
        ("ratings.csv", ("items.csv", "movies.csv"), ("users.csv",), ("tags.csv",)),
    )
    for folder in (src, *sorted(path for path in src.iterdir() if path.is_dir())):
        for ratings, *others in layouts:
            if (folder / ratings).is_file():
                movies, users, tags = (_first_file(folder, names) for names in others)
                return Source(folder / ratings, movies, users, tags, _posters(folder))
    raise UserError(
        f"--src {src} holds no MovieLens: none of u.data, ratings.dat, ratings.csv is there; "
        "unpack a download of https://grouplens.org/datasets/movielens and name its folder"
    )


def _first_file(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _posters(folder: Path) -> dict[int, Path]:
    return {
        int(path.stem): path
        for path in sorted((folder / "posters").glob("*"))
        if path.suffix.lower() in POSTER_SUFFIXES and path.stem.isdigit()
    }


# --- ratings -------------------------------------------------------------------------------------


def read_ratings(path: Path) -> Ratings:
    """The log, sorted; about 40 bytes a rating while it is read.

    Raises:
        UserError: a line does not fit.
    """
    parts: list[tuple[Int64Array, Int64Array, Int8Array, Int64Array]] = []
    line = 2 if path.suffix == ".csv" else 1
    for batch in _rating_batches(path):
        refuse_nulls(path, batch, line)
        user, item, rating, seconds = (column.to_numpy() for column in batch.columns)
        doubled = rating * 2
        wrong = (doubled < 1) | (doubled > 10) | (doubled != np.round(doubled))
        wrong |= (seconds < 0) | (seconds >= _YEAR_10000)
        if wrong.any():
            at = int(wrong.argmax())
            raise UserError(
                f"{path}, line {line + at}: rating {rating[at]} at timestamp {seconds[at]}; "
                "ratings are 0.5 .. 5 in half stars, timestamps seconds since 1970: correct it"
            )
        parts.append((user, item, doubled.astype(np.int8), seconds))
        line += batch.num_rows
    if not parts:
        raise UserError(f"{path} holds no rating; download it again")
    users, items, half_stars, seconds = (
        np.concatenate([part[column] for part in parts]) for column in range(4)
    )
    order = np.lexsort((items, users, seconds))
    return Ratings(users[order], items[order], half_stars[order], seconds[order])


def _rating_batches(path: Path) -> Iterator[pa.RecordBatch]:
    kinds = (pa.int64(), pa.int64(), pa.float64(), pa.int64())
    if path.suffix == ".csv":
        names = _named_columns(path)
        return stream_table(path, dict(zip(names, kinds, strict=True)), delimiter=",", header=None)
    types = dict(zip(RATING_ALIASES, kinds, strict=True))
    if path.name == "u.data":
        return stream_table(path, types, delimiter="\t", header=list(types))
    # `::` is two separators with nothing in between.
    header = ["user", "_1", "item", "_2", "rating", "_3", "timestamp"]
    return stream_table(path, types, delimiter=":", header=header)


def _named_columns(path: Path) -> list[str]:
    header = header_of(path)
    names = []
    for aliases in RATING_ALIASES.values():
        found = [name for name in aliases if name in header]
        if not found:
            raise UserError(
                f"{path}: its header {header} has none of the columns {list(aliases)}; rename the "
                "column that holds it"
            )
        names.append(found[0])
    return names


# --- movies --------------------------------------------------------------------------------------


def read_movies(path: Path | None) -> dict[int, Movie]:
    """Films by id; {} where there is no file.

    Raises:
        UserError: a line does not fit.
    """
    if path is None:
        return {}
    if path.suffix == ".csv":
        return dict(_csv_movies(path))
    movies = {}
    if path.name == "u.item":
        for line, cells in split_lines(path, "|", 5 + len(GENRES_100K)):
            flags = zip(GENRES_100K, cells[5:], strict=False)
            movie = _movie(cells[1], [name for name, flag in flags if flag.strip() == "1"])
            movies[to_int(cells[0], path, line, "movie id")] = movie
        return movies
    for line, cells in split_lines(path, "::", 3):
        title = "::".join(cells[1:-1])
        movies[to_int(cells[0], path, line, "MovieID")] = _movie(title, cells[-1].split("|"))
    return movies


def _csv_movies(path: Path) -> Iterator[tuple[int, Movie]]:
    reader = csv.DictReader(text_lines_with_ends(path))
    header = list(reader.fieldnames or ())
    key = next((name for name in RATING_ALIASES["item"] if name in header), None)
    if key is None or "title" not in header:
        raise UserError(
            f"{path}: its header {header} needs the columns movieId (or movie_id) and title; add "
            "or rename them"
        )
    flags = [name for name in header if name in ITEM_FLAG_COLUMNS]
    for line, row in csv_rows(reader, path, (key, "title")):
        genres = [name for name in flags if row[name] == "1"] or (row.get("genres") or "").split(
            "|"
        )
        movie = _movie(row["title"], genres)
        if row.get("year"):
            movie.year = to_int(row["year"].removesuffix(".0"), path, line, "year", bits=16)
        movie.overview = (row.get("overview") or "").strip()
        movie.poster = row.get("poster") or None
        yield to_int(row[key], path, line, key), movie


def text_lines_with_ends(path: Path) -> list[str]:
    """Lines as the csv module wants them: a quoted cell may hold line breaks."""
    return [line + "\n" for line in text_lines(path)]


def _movie(title: str, genres: list[str]) -> Movie:
    year = YEAR_IN_TITLE.search(title)
    kept = [GENRE_NAMES.get(name.strip(), name.strip()) for name in genres]
    return Movie(
        title.strip(),
        [name for name in kept if name not in NO_GENRE],
        int(year.group(1)) if year else None,
    )


# --- users ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Person:
    """What the files say about one user."""

    age: int
    sex: str
    occupation: str
    zip_code: str


def read_users(path: Path | None) -> dict[int, Person]:
    """Users by id; {} where there is no file.

    Raises:
        UserError: a line does not fit.
    """
    if path is None:
        return {}
    users = {}
    if path.suffix == ".csv":
        reader = csv.DictReader(text_lines_with_ends(path))
        wanted = ("user_id", "age", "sex", "occupation", "zip_code")
        missing = sorted({*wanted} - set(reader.fieldnames or ()))
        if missing:
            raise UserError(f"{path}: its header lacks {missing}; add them or remove the file")
        for line, row in csv_rows(reader, path, wanted):
            age = to_int(row["age"], path, line, "age", bits=16)
            key = to_int(row["user_id"], path, line, "user_id")
            users[key] = Person(age, row["sex"], row["occupation"], row["zip_code"])
        return users
    is_100k = path.name == "u.user"
    for line, cells in split_lines(path, "|" if is_100k else "::", 5):
        key = to_int(cells[0], path, line, "user id")
        if is_100k:
            age = to_int(cells[1], path, line, "age", bits=16)
            users[key] = Person(age, cells[2], cells[3], cells[4])
            continue
        code = to_int(cells[3], path, line, "occupation")
        if not 0 <= code < len(OCCUPATIONS_1M):
            raise UserError(
                f"{path}, line {line}: occupation {code} is not 0 .. {len(OCCUPATIONS_1M) - 1}; "
                "correct the line"
            )
        age = to_int(cells[2], path, line, "age", bits=16)
        users[key] = Person(age, cells[1], OCCUPATIONS_1M[code], cells[4])
    return users


# --- tags ----------------------------------------------------------------------------------------


def read_tags(path: Path | None) -> dict[int, list[str]]:
    """The most frequent tags of each film, lower case; {} where there is no file.

    Raises:
        UserError: a line does not fit.
    """
    if path is None:
        return {}
    table = _tag_table(path)
    counts = (
        table.filter(pc.is_valid(table["tag"]))
        .group_by(["item", "tag"])
        .aggregate([("tag", "count")])
        .sort_by([("item", "ascending"), ("tag_count", "descending"), ("tag", "ascending")])
    )
    tags: dict[int, list[str]] = {}
    for item, tag in zip(counts["item"].to_pylist(), counts["tag"].to_pylist(), strict=True):
        kept = tags.setdefault(item, [])
        if len(kept) < TAGS_PER_ITEM:
            kept.append(tag)
    return tags


def _tag_table(path: Path) -> pa.Table:
    if path.suffix == ".csv":
        key = next((n for n in RATING_ALIASES["item"] if n in header_of(path)), "movieId")
        batches = list(
            stream_table(path, {key: pa.int64(), "tag": pa.string()}, delimiter=",", header=None)
        )
        table = pa.Table.from_batches(batches).rename_columns(["item", "tag"])
    else:
        rows = [
            (to_int(cells[1], path, line, "MovieID"), "::".join(cells[2:-1]))
            for line, cells in split_lines(path, "::", 4)
        ]
        items, words = zip(*rows, strict=True) if rows else ((), ())
        table = pa.table({"item": pa.array(items, pa.int64()), "tag": pa.array(words, pa.string())})
    words = pc.utf8_lower(pc.utf8_trim_whitespace(table["tag"]))
    return table.set_column(1, "tag", words)
