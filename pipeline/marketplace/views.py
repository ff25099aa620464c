"""What is seen of an item of the synthetic marketplace: text, image, and side information.

Every view is noisy: it is drawn from the latent, and never holds it.
"""

# Shapes: N items, D taste dimensions, W words, S image size.

import struct
import zlib
from typing import Any

import numpy as np
import pyarrow as pa

from embedding.raw_ids import Int64Array
from pipeline.marketplace.counter_random import CounterRandom, FloatArray
from pipeline.marketplace.market import Marketplace, sigmoid

Uint8Array = np.ndarray[Any, np.dtype[np.uint8]]

NUM_WORDS = 24
WORD_SHARPNESS = 1.5
CATEGORY_NOISE = 1.0
IMAGE_NOISE = 0.3
PIXELS_AT_ONCE = 1 << 20
BRANDS_PER_TOPIC = 5

TOPICS = {
    "garden": "seeds soil rake hose flower lawn pruner compost bulb greenhouse herb terrace",
    "metal": "steel forged chrome bolt alloy rivet titanium welded brass iron gear piston",
    "music": "guitar melody drum vinyl bass chord amplifier piano rhythm violin concert studio",
    "silence": "quiet reading calm library pillow candle tea meditation blanket slow retreat sleep",
    "sport": "running racket training goal bicycle marathon stadium sprint helmet climbing coach",
    "kitchen": "pan recipe knife oven spice baking bowl whisk pasta grill apron espresso",
    "ocean": "surf wave sail beach coral diving anchor harbour salt reef tide captain",
    "mountain": "summit alpine hiking snow trail rope cabin glacier valley ridge compass tent",
    "gadget": "wireless charger screen sensor usb smart battery camera robot drone laptop speaker",
    "craft": "wool knitting clay wood carving thread paper loom paint pottery leather needle",
    "fashion": "silk dress jacket scarf elegant denim runway velvet heels collar tailored style",
    "workwear": "boots gloves safety rugged canvas pockets overalls toolbelt durable vest",
    "space": "galaxy rocket orbit telescope planet comet astronaut lunar nebula satellite star",
    "history": "castle roman antique empire museum knight medieval archive ruins parchment coin",
    "toys": "puzzle teddy blocks playful puppet marble kite balloon dinosaur train colourful",
    "finance": "ledger market budget invoice portfolio stock banking tax audit dividend savings",
}
_SYLLABLES = ("ba", "ko", "ri", "te", "mu", "la", "so", "ne", "vi", "du", "pa", "zo")


def topic_names(num_topics: int) -> list[str]:
    """Names of the topics; every latent dimension has one at either end."""
    return [*TOPICS, *(f"topic{i}" for i in range(len(TOPICS), num_topics))][:num_topics]


def vocabularies(num_topics: int) -> list[list[str]]:
    """Words of each topic: real ones as far as there are any, made-up ones beyond."""
    real = [words.split() for words in TOPICS.values()]
    made_up = [
        [_made_up_word(topic, word) for word in range(12)] for topic in range(len(real), num_topics)
    ]
    return [*real, *made_up][:num_topics]


def _made_up_word(topic: int, word: int) -> str:
    number, text = topic * 12 + word, ""
    while number:
        number, digit = divmod(number, len(_SYLLABLES))
        text += _SYLLABLES[digit]
    return text


def catalogue(market: Marketplace, items: Int64Array) -> pa.Table:
    """Rows of items.parquet."""
    random = market.random
    latents_ND = market.latents(items)
    topics_NT = np.hstack([latents_ND, -latents_ND])
    names = np.array(topic_names(topics_NT.shape[1]))
    noise = CATEGORY_NOISE * random.normal("category", items, topics_NT.shape[1])
    category = (topics_NT + noise).argmax(axis=1)
    brand_of = (topics_NT + 2 * CATEGORY_NOISE * noise[:, ::-1]).argmax(axis=1)
    maker = random.integers("brand", items, BRANDS_PER_TOPIC)
    brand = np.char.add(np.char.add(names[brand_of], "-"), maker.astype(str))
    price = np.exp(2.5 + 0.5 * latents_ND[:, 0] + 0.7 * random.normal("price", items)[:, 0])
    return pa.table(
        {
            "item_id": items,
            "category": names[category],
            "brand": brand,
            "price": np.round(price, 2).astype(np.float32),
            "born_day": _birthdays(market, items),
            "text": pa.array(texts(random, items, topics_NT), pa.string()),
            "image": pa.array(images(market, items, latents_ND), pa.binary()),
        }
    )


def audience(market: Marketplace, users: Int64Array) -> pa.Table:
    """Rows of users.parquet: country and age group tell a little about the taste."""
    random = market.random
    tastes = market.tastes(users, 0)
    country_noise = 1.5 * random.normal("country", users, 6)
    hints = np.zeros((len(users), 6))
    hints[:, : tastes.shape[1]] = tastes[:, :6]
    countries = np.array(["de", "fr", "it", "jp", "br", "us"])
    age = 40 + 10 * random.normal("age", users)[:, 0] + 5 * tastes[:, -1]
    age = np.clip(age, 16, 90).astype(np.int16)
    return pa.table(
        {
            "user_id": users,
            "country": countries[(hints + country_noise).argmax(axis=1)],
            "age": age,
            "age_group": age // 10,
        }
    )


def _birthdays(market: Marketplace, items: Int64Array) -> Int64Array:
    """Day of birth counted from the first day; negative before it."""
    births = max(market.births, 1)
    return -((market.config.num_items - 1 - items) // births)


# --- text ----------------------------------------------------------------------------------------


def texts(random: CounterRandom, items: Int64Array, topics_NT: FloatArray) -> list[str]:
    """Words of each item, drawn from topics in proportion to exp(sharpness * latent)."""
    weights_NT = np.exp(WORD_SHARPNESS * topics_NT)
    shares_NT = np.cumsum(weights_NT / weights_NT.sum(axis=1, keepdims=True), axis=1)
    draws_NW = random.uniform("topic of word", items, NUM_WORDS)
    topic_NW = np.stack(
        [(draws_NW[:, [w]] > shares_NT[:, :-1]).sum(axis=1) for w in range(NUM_WORDS)], axis=1
    )
    words = vocabularies(topics_NT.shape[1])
    flat = np.array([word for vocabulary in words for word in vocabulary], object)
    sizes = np.array([len(vocabulary) for vocabulary in words])
    starts = np.cumsum(sizes) - sizes
    pick_NW = (random.uniform("word", items, NUM_WORDS) * sizes[topic_NW]).astype(np.int64)
    return [" ".join(row) for row in flat[starts[topic_NW] + pick_NW]]


# --- images --------------------------------------------------------------------------------------


def images(market: Marketplace, items: Int64Array, latents_ND: FloatArray) -> list[bytes]:
    """PNG pictures: background and figure colours, place, size and stripes follow the latent.

    Latent dimensions beyond the eighth are grey blocks along the lower edge.
    """
    dim = latents_ND.shape[1]
    seen_ND = latents_ND + IMAGE_NOISE * market.random.normal("image", items, dim)
    spare = market.random.normal("image rest", items, 8)
    parameters = sigmoid(1.5 * np.hstack([seen_ND[:, :8], spare]))[:, :8].astype(np.float32)
    blocks = sigmoid(1.5 * seen_ND[:, 8:]).astype(np.float32)
    size = market.config.image_size
    step = max(1, PIXELS_AT_ONCE // size**2)
    return [
        encode_png(picture)
        for first in range(0, len(items), step)
        for picture in _render(parameters[first : first + step], blocks[first : first + step], size)
    ]


def _render(unit: FloatArray, blocks: FloatArray, size: int) -> Uint8Array:
    """Pictures (N, S, S, 3) of parameters in (0, 1)."""
    row = (np.arange(size, dtype=np.float32) + 0.5) / size
    y_SS, x_SS = np.meshgrid(row, row, indexing="ij")
    across = np.abs(x_SS[None] - (0.25 + 0.5 * unit[:, 5, None, None]))
    along = np.abs(y_SS[None] - 0.45)
    radius = (0.1 + 0.25 * unit[:, 6])[:, None, None]
    is_round = (unit[:, 7] > 0.5)[:, None, None]
    inside = np.where(
        is_round, np.hypot(across, along) < radius, np.maximum(across, along) < radius
    )
    background = unit[:, None, None, 0:3]
    figure = np.concatenate([unit[:, 3:5], 1 - unit[:, 0:1]], axis=1)[:, None, None, :]
    pixels = np.where(inside[..., None], figure, background)
    if blocks.shape[1]:
        _draw_blocks(pixels, blocks)
    return np.asarray((pixels * 255).astype(np.uint8))


def _draw_blocks(pixels: FloatArray, levels: FloatArray) -> None:
    size, num_blocks = pixels.shape[1], levels.shape[1]
    block = np.arange(size) * num_blocks // size
    pixels[:, -max(1, size // 8) :, :, :] = levels[:, None, block, None]


def encode_png(pixels: Uint8Array) -> bytes:
    """An RGB picture (height, width, 3) as PNG."""
    height, width, _ = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # a leading 0: the row is not filtered
    rows[:, 1:] = pixels.reshape(height, -1)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )
