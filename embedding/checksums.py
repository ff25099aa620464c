"""Checksums of files."""

import hashlib
from pathlib import Path


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal digits; memory holds a block of it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
