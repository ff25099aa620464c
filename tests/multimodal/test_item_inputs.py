"""Texts and images of every kind become inputs, or are counted by cause."""

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from embedding.errors import UserError
from multimodal.content_config import ImageTower, TextTower
from multimodal.images import DAMAGED, MISSING, NO_FILE, OUTSIDE, TOO_LARGE, read_image
from multimodal.item_inputs import ImagePreparer, TextPreparer
from tests.multimodal.small_models import save_image_model, save_text_model

RED = (200, 30, 10)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def mean_colour(value: bytes | str, root: Path = Path()) -> np.ndarray:
    """Of what the tiny tower's preparer makes of an image, in 0 .. 255."""
    prepared = ImagePreparer(ImageTower(image_size=16), root)([value])
    assert prepared.faults == [None]
    pixels = prepared.inputs["pixel_values"]
    assert pixels.shape == (1, 3, 16, 16)
    return ((pixels[0].mean(dim=(1, 2)) * 0.5 + 0.5) * 255).numpy()


# --- images --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "MPO", "GIF", "BMP", "WEBP", "TIFF"])
def test_the_file_format_does_not_matter(kind: str) -> None:
    value = encoded(Image.new("RGB", (40, 20), RED), kind)
    np.testing.assert_allclose(mean_colour(value), RED, atol=6)


def test_every_colour_mode_becomes_rgb() -> None:
    transparent = Image.new("RGBA", (8, 8), (*RED, 0))
    np.testing.assert_allclose(mean_colour(encoded(transparent)), 255, atol=1)
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    np.testing.assert_allclose(mean_colour(encoded(half)), 127, atol=2)
    cmyk = Image.new("RGB", (8, 8), RED).convert("CMYK")
    np.testing.assert_allclose(mean_colour(encoded(cmyk, "JPEG")), RED, atol=6)
    np.testing.assert_allclose(mean_colour(encoded(Image.new("L", (8, 8), 90))), 90, atol=1)
    np.testing.assert_allclose(mean_colour(encoded(Image.new("1", (8, 8), 1))), 255, atol=1)
    palette = Image.new("RGB", (8, 8), RED).convert("P", palette=Image.Palette.ADAPTIVE)
    np.testing.assert_allclose(mean_colour(encoded(palette)), RED, atol=3)
    deep = Image.fromarray(np.full((8, 8), 128 * 257, np.uint16))
    np.testing.assert_allclose(mean_colour(encoded(deep)), 128, atol=1)


WIDTH, MAKER, ORIENTATION = 0x0100, 0x010F, 0x0112


def upright(orientation: int) -> Image.Image:
    """What Pillow makes of a picture whose four quarters differ."""
    turned = Image.fromarray(np.arange(0, 240, 60, np.uint8).reshape(2, 2)).resize((16, 16), 0)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    value = encoded(turned, exif=exif)
    found = read_image(value, Path(), 16, 1000)
    assert isinstance(found, Image.Image)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(value))).convert("RGB")
    assert found.tobytes() == expected.tobytes()
    return found


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("odd", [WIDTH, MAKER])
def test_a_turned_photograph_is_put_upright(kind: str, odd: int) -> None:
    picture = Image.new("RGB", (8, 16), "black")
    picture.paste("white", (0, 0, 8, 8))  # the upper half
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    # TIFF, little endian: a fraction where none belongs, and an orientation: clockwise to view.
    entries = struct.pack("<HHII", odd, 5, 1, 38) + struct.pack("<HHIHH", ORIENTATION, 3, 1, 6, 0)
    directory = struct.pack("<H", 2) + entries + struct.pack("<III", 0, 1, 1)
    exif = b"Exif\x00\x00II*\x00" + struct.pack("<I", 8) + directory
    preparer = ImagePreparer(ImageTower(image_size=16), Path())
    pixels = preparer([encoded(turned, kind, exif=exif)]).inputs["pixel_values"][0, 0]
    assert pixels[:6].mean() > 0.9
    assert pixels[-6:].mean() < -0.9


def test_all_eight_orientations_are_those_of_pillow() -> None:
    assert len({upright(orientation).tobytes() for orientation in range(1, 9)}) == 8


DAMAGED_EXIF = {
    # A directory of one entry of four, cut within the entry.
    "cut": b"II*\x00\x08\x00\x00\x00\x01\x00\x12\x01",
    "no TIFF": b"not at all EXIF",
    "cut header": b"II*\x00\x08\x00",
    # Where the directory begins: far behind the end.
    "astray": b"MM\x00*\xff\xff\xff\xff",
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("exif", DAMAGED_EXIF.values(), ids=DAMAGED_EXIF)
def test_a_picture_with_damaged_exif_is_not_turned(kind: str, exif: bytes) -> None:
    picture = Image.new("RGB", (8, 16), RED)
    value = encoded(picture, kind, exif=b"Exif\x00\x00" + exif)
    assert exif in value
    np.testing.assert_allclose(mean_colour(value), RED, atol=6)


def test_images_that_cannot_be_used_are_counted_by_cause(tmp_path: Path) -> None:
    sound = encoded(Image.new("RGB", (32, 32), RED), "JPEG")
    bomb = encoded(Image.new("1", (3000, 3000)))
    assert len(bomb) < 10_000
    (tmp_path / "sound.jpg").write_bytes(sound)
    preparer = ImagePreparer(ImageTower(image_size=16, max_pixels=1_000_000), tmp_path)
    noise = encoded(Image.effect_noise((64, 64), 80), "PNG")
    values = [
        sound,
        None,
        b"",
        bomb,
        noise[: len(noise) // 2],
        b"no image",
        "sound.jpg",
        "gone.jpg",
    ]
    prepared = preparer(values)
    expected = [None, MISSING, MISSING, TOO_LARGE, DAMAGED, DAMAGED, None, NO_FILE]
    assert prepared.faults == expected
    assert prepared.inputs["pixel_values"].shape == (2, 3, 16, 16)
    torch.testing.assert_close(*prepared.inputs["pixel_values"])


@pytest.mark.parametrize("kind", ["PPM", "TGA", "ICO", "EPS", "PCX"])
def test_a_sound_picture_of_a_format_that_is_not_read_is_damaged(kind: str) -> None:
    value = encoded(Image.new("RGB", (16, 16), RED), kind)
    with Image.open(io.BytesIO(value)) as image:
        assert image.format == kind
    assert ImagePreparer(ImageTower(image_size=16), Path())([value]).faults == [DAMAGED]


def test_paths_do_not_leave_the_data_root(tmp_path: Path) -> None:
    root = tmp_path / "data"
    (root / "posters").mkdir(parents=True)
    sound = encoded(Image.new("RGB", (16, 16), RED))
    for folder in (tmp_path, root, root / "posters"):
        (folder / "a.png").write_bytes(sound)
    preparer = ImagePreparer(ImageTower(image_size=16), root)

    inside = ["a.png", "./a.png", "posters/a.png"]
    outside = ["../a.png", "posters/../../a.png", str(tmp_path / "a.png"), str(root / "a.png")]

    assert preparer(inside).faults == [None] * 3
    assert preparer(outside).faults == [OUTSIDE] * 4


def test_a_batch_without_any_image_has_no_rows() -> None:
    prepared = ImagePreparer(ImageTower(image_size=16), Path())([None, b"x"])
    assert prepared.inputs["pixel_values"].shape == (0, 3, 16, 16)
    assert prepared.faults == [MISSING, DAMAGED]


def test_pixels_have_the_range_of_the_models_training(tmp_path: Path) -> None:
    path = save_image_model(tmp_path)
    config = '{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.25, 0.125]}'
    (tmp_path / "preprocessor_config.json").write_text(config)
    preparer = ImagePreparer(ImageTower(model=path, image_size=28), Path())
    pixels = preparer([encoded(Image.new("RGB", (5, 5), (255, 51, 0)))]).inputs["pixel_values"][0]
    expected = [(1 - 0.1) / 0.5, (0.2 - 0.2) / 0.25, (0 - 0.3) / 0.125]
    torch.testing.assert_close(pixels.mean(dim=(1, 2)), torch.tensor(expected))


# --- text ----------------------------------------------------------------------------------------


def test_texts_are_padded_cut_and_counted() -> None:
    prepared = TextPreparer(TextTower(max_tokens=3))(["a b c d", None, " ", "One", "one!"])
    assert prepared.faults == [None, MISSING, MISSING, None, None]
    assert prepared.is_cut == [True, False, False]
    assert prepared.mask_ML is not None
    assert prepared.mask_ML.tolist() == [[True] * 3, [True, False, False], [True, False, False]]
    ids_ML = prepared.inputs["input_ids"]
    assert len(set(ids_ML[0].tolist())) == 3
    assert torch.equal(ids_ML[1], ids_ML[2])
    assert torch.equal(prepared.inputs["attention_mask"], prepared.mask_ML.long())


def test_a_text_of_marks_only_has_a_token() -> None:
    prepared = TextPreparer(TextTower())(["?!"])
    assert prepared.mask_ML is not None
    assert prepared.mask_ML.tolist() == [[True]]


def test_no_texts_have_no_rows() -> None:
    prepared = TextPreparer(TextTower())([None, ""])
    assert prepared.inputs["input_ids"].shape == (0, 1)


def test_a_pretrained_tokenizer_closes_a_text_that_it_cuts(tmp_path: Path) -> None:
    path = save_text_model(tmp_path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "blue", "green"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    prepared = TextPreparer(TextTower(model=path, max_tokens=4))(["red blue green red", "Blue"])
    ids = prepared.inputs["input_ids"].tolist()
    assert [words[i] for i in ids[0]] == ["[CLS]", "red", "blue", "[SEP]"]
    assert [words[i] for i in ids[1]] == ["[CLS]", "blue", "[SEP]", "[PAD]"]
    assert prepared.is_cut == [True, False]


def test_a_model_without_tokenizer_is_refused(tmp_path: Path) -> None:
    path = save_text_model(tmp_path)
    with pytest.raises(UserError, match="has no tokenizer; add"):
        TextPreparer(TextTower(model=path, max_tokens=4))
