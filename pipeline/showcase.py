"""What an item of the synthetic marketplace looks like: its text and its rendered image.

Both are noisy views of the item's latent: words come from the vocabulary of the topics that lie
near the latent, colours and shapes follow its coordinates.
"""

# Shapes: B items, T topics, D taste dimensions, P pixels a side.

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

FloatArray = np.ndarray[Any, np.dtype[np.float64]]

TOPIC_WORDS = (
    "tent trail boots backpack summit campfire compass lantern",
    "oven dough flour pastry whisk bakery cake vanilla",
    "guitar chord amplifier melody drum vinyl concert rhythm",
    "puppy leash kennel collar kitten whiskers treats fur",
    "lipstick mascara perfume blush serum nail lotion glow",
    "engine tyre brake gearbox piston chrome garage diesel",
    "novel chapter poetry library author paperback story prose",
    "dumbbell treadmill squat protein muscle sprint yoga gym",
    "soil seed pruning tulip greenhouse compost fern bloom",
    "laptop keyboard processor monitor router firmware circuit pixel",
    "crib stroller bottle nursery rattle diaper toddler lullaby",
    "hammer drill plywood sander screws toolbox varnish lumber",
    "sofa curtain cushion lamp carpet shelf armchair linen",
    "canvas brush easel watercolor sketch pigment gallery portrait",
    "surfboard wetsuit wave snorkel kayak reef paddle harbor",
    "espresso teapot roast brew mug barista cinnamon latte",
    "sneaker denim jacket scarf hoodie leather zipper wool",
    "chess dice puzzle cards boardgame token dungeon strategy",
    "telescope planet comet nebula orbit rocket lunar star",
    "passport luggage hostel airport map itinerary beach souvenir",
    "saddle pony bridle stable hay gallop rider mane",
    "necklace pearl ring diamond bracelet silver gem brooch",
    "tractor harvest barn wheat orchard cattle plough silo",
    "camera lens tripod shutter aperture flash film darkroom",
)
QUALITY_WORDS = ("shabby", "plain", "decent", "fine", "superb", "exquisite")
_FILLER = "the with for your new and made set pack size daily edition"
MAX_TOPICS = len(TOPIC_WORDS)

_WORDS_PER_TEXT = 12
_FILLER_SHARE = 0.25


def describe(topics_BT: FloatArray, quality_B: FloatArray, rng: np.random.Generator) -> pa.Array:
    """Texts of items.

    Args:
        topics_BT: weight of each topic for each item; rows sum to 1.
        quality_B: visible quality, standard normal.
        rng: source of the noise.
    """
    num_items, num_topics = topics_BT.shape
    vocabulary = np.array([word.split() for word in TOPIC_WORDS[:num_topics]])
    shape = (num_items, _WORDS_PER_TEXT)
    topic = (rng.random(shape)[:, :, None] > topics_BT.cumsum(axis=1)[:, None, :-1]).sum(axis=2)
    words = vocabulary[topic, rng.integers(0, vocabulary.shape[1], shape)].astype(object)
    fillers = np.array(_FILLER.split(), object)
    filler = rng.random(shape) < _FILLER_SHARE
    words[filler] = fillers[rng.integers(0, len(fillers), filler.sum())]
    # Two adjectives, each a noisy reading of the quality.
    noisy = quality_B[:, None] + rng.normal(0, 0.5, (num_items, 2))
    level = np.clip(np.floor(noisy * 1.2 + len(QUALITY_WORDS) / 2), 0, len(QUALITY_WORDS) - 1)
    words[:, :2] = np.array(QUALITY_WORDS, object)[level.astype(int)]
    flat = pa.array(words.reshape(-1), pa.string())
    offsets = pa.array(np.arange(0, words.size + 1, _WORDS_PER_TEXT, dtype=np.int32))
    return pc.binary_join(pa.ListArray.from_arrays(offsets, flat), " ")


def render(
    latents_BD: FloatArray, quality_B: FloatArray, size: int, rng: np.random.Generator
) -> pa.Array:
    """PNG images of items, `size` pixels a side.

    Colours of background and figure follow the first latent coordinates, the outline (a
    superellipse with lobes) follows the others, the figure grows with quality.
    """
    num_items, dim = latents_BD.shape
    seen_BD = latents_BD + rng.normal(0, 0.2, latents_BD.shape) * latents_BD.std()
    unit_BD = 1 / (1 + np.exp(-2.5 * seen_BD / latents_BD.std()))
    channel = np.arange(8) % dim
    background = unit_BD[:, channel[:3]]
    figure = unit_BD[:, channel[3:6]]
    lobes = 1 + np.floor(unit_BD[:, channel[6]] * 6)
    axis = np.linspace(-1, 1, size)
    angle_PP = np.arctan2(axis[:, None], axis[None, :])
    radius_PP = np.hypot(axis[:, None], axis[None, :])
    wave = 0.25 * unit_BD[:, channel[7], None, None] * np.cos(lobes[:, None, None] * angle_PP)
    reach = 0.6 + 0.12 * np.clip(quality_B, -2, 2)
    inside = radius_PP[None] < reach[:, None, None] * (1 + wave)
    pixels = np.where(inside[..., None], figure[:, None, None], background[:, None, None])
    pixels = pixels + rng.normal(0, 0.03, pixels.shape)
    images = np.clip(pixels * 255, 0, 255).astype(np.uint8)
    return pa.array([_png(images[i]) for i in range(num_items)], pa.binary())


def _png(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
