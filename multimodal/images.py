"""Images of items as RGB pixels, or the cause why there are none. Loads no towers."""

# Shapes: S image size.

import io
import struct
import warnings
from pathlib import Path, PurePath

import numpy as np
from PIL import ExifTags, Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""All that is decoded, whatever else Pillow knows: a file of the catalogue must not choose among
decoders, one of which (of EPS) runs an interpreter."""

MISSING = "missing"
"""A null, or a blank text: not a fault, but no input either."""
NO_FILE = "no file"
OUTSIDE = "outside the data root"
TOO_LARGE = "too many pixels"
DAMAGED = "damaged"

FAULTS = (
    *(OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, RuntimeError),
    struct.error,
)
"""What Pillow's many decoders raise on truncated or foreign bytes."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What puts a picture upright, by EXIF orientation."""


def image_path(value: str, root: Path) -> Path | None:
    """Where an image that the catalogue names lies; None if it names a place outside the data root.

    A link below the root may lead out of it: whoever delivers the catalogue cannot make one there.
    """
    path = PurePath(value)
    return None if path.is_absolute() or ".." in path.parts else root / path


def read_image(value: bytes | str, root: Path, size: int, max_pixels: int) -> Image.Image | str:
    """The picture upright and in RGB, or why there is none.

    Transparent parts become white; the first frame of an animation counts.

    Args:
        value: of items.parquet: the bytes of a file, or a path.
        root: what paths are relative to.
        size: what the picture is for; a JPEG may be decoded at less than its own, and at no less
            than twice this one.
        max_pixels: refuse larger ones before they are decoded.
    """
    source = image_path(value, root) if isinstance(value, str) else io.BytesIO(value)
    if source is None:
        return OUTSIDE
    try:
        with warnings.catch_warnings():
            # Ours is the limit; Pillow's own warns below it and refuses beyond.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(source, formats=FORMATS) as image:  # reads the header only
                if image.width * image.height > max_pixels:
                    return TOO_LARGE
                image.draft("RGB", (2 * size, 2 * size))  # a JPEG is decoded at a fraction
                image.load()
                return _rgb(_upright(image))
    except Image.DecompressionBombError:
        return TOO_LARGE
    except FileNotFoundError:
        return NO_FILE
    except FAULTS:
        return DAMAGED


def square_pixels(image: Image.Image, size: int) -> np.ndarray:
    """The whole picture squeezed into a square: uint8 (S, S, 3)."""
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def _upright(image: Image.Image) -> Image.Image:
    """Turned as EXIF says; as it is where EXIF cannot be read, for its pixels are sound.

    `ImageOps.exif_transpose` also writes EXIF anew, and so fails on entries that do not matter.
    """
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except FAULTS:
        return image
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    """A decoded copy."""
    if image.mode.startswith(("I", "F")):  # 16-bit grey: convert() would clip it to white
        grey = np.asarray(image, dtype=np.float32)
        return Image.fromarray((grey / 257).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
