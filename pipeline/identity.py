"""Which settings of a recipe an artifact depends on; changing any other leaves it current."""

from typing import Any

from multimodal.content_config import ContentConfig
from multimodal.tower_files import TOKENS_FORMAT, input_settings
from pipeline.config import Recipe
from pipeline.samples.columns import EventColumns
from ranking.compatibility import table_widths

SAMPLES_FORMAT = 2
"""Of what join writes; samples of another format are joined again."""


def ingest_config(recipe: Recipe) -> dict[str, Any]:
    """What validated events and histories depend on: columns of the events alone.

    Not how many faulty rows are let through. Columns of items and users are read when samples are
    made.
    """
    columns = EventColumns.of(recipe)
    both = sorted(name for name in columns.dense if columns.number_column(name) != name)
    return {
        "histories": [history.model_dump(mode="json") for history in recipe.features.histories],
        "history_values": columns.history_values,
        "ids": sorted(columns.ids),
        "dense": sorted(columns.dense),
        "tasks": _tasks(recipe),
        "user_buckets": recipe.data.user_buckets,
        "numbers_beside_ids": both,
    }


def samples_config(recipe: Recipe) -> dict[str, Any]:
    """What samples depend on: columns and tasks, not the tables that ids are looked up in."""
    modelled = {"table", "pooling", "target"}
    features = recipe.features.model_dump(mode="json", exclude={"tables"})
    columns = {
        part: [{key: v for key, v in feature.items() if key not in modelled} for feature in group]
        for part, group in features.items()
    }
    held_out = recipe.evaluation.held_out_items
    more = {} if held_out is None else {"held_out": held_out.model_dump(include={"share", "seed"})}
    if recipe.codes is not None:
        more["codes"] = recipe.codes.shared
    return {"format": SAMPLES_FORMAT, "features": columns, "tasks": _tasks(recipe), **more}


def content_config(content: ContentConfig) -> dict[str, Any]:
    """What stored tokens of items depend on: how deep towers are cut, not what trains above."""
    return {
        "format": TOKENS_FORMAT,
        "towers": {
            name: {
                "model": tower.model,
                "revision": tower.revision,
                "column": tower.column,
                "layers_in_step": tower.layers_in_step,
                "inputs": input_settings(tower),
                "precision": tower.precision,
            }
            for name, tower in content.towers.items()
        },
    }


def plan_config(recipe: Recipe) -> dict[str, Any]:
    """What a sharding plan depends on; the model only makes rows wider, content takes memory."""
    features = table_widths(recipe.features, recipe.ranking.model)
    content = {}
    if recipe.content is not None:
        content = {"content": recipe.content.model_dump(mode="json", exclude={"tokens"})}
    return {
        **content,
        "features": features.model_dump(mode="json"),
        "embedding": recipe.embedding.model_dump(mode="json"),
        "cluster": recipe.cluster.model_dump(
            mode="json", include={"num_workers", "cpus_per_worker", "use_gpu"}
        ),
        "batch_size_per_rank": recipe.ranking.trainer.batch_size_per_rank,
    }


def training_config(recipe: Recipe) -> dict[str, Any]:
    """What a trained model depends on: not how often its training reports and saves."""
    reporting = {"trainer": {"log_every_steps", "checkpoint_every_steps", "keep_checkpoints"}}
    content = {}
    if recipe.content is not None:
        content = {"content": recipe.content.model_dump(mode="json", exclude={"tokens"})}
    return {
        "features": recipe.features.model_dump(mode="json"),
        "embedding": recipe.embedding.model_dump(mode="json"),
        "ranking": recipe.ranking.model_dump(mode="json", exclude=reporting),
        **content,
    }


def publish_config(recipe: Recipe) -> dict[str, Any]:
    """What a bundle depends on besides its training; what was published before 8 bits is fp32."""
    tables = recipe.publish.tables
    return {} if tables == "fp32" else {"tables": tables}


def _tasks(recipe: Recipe) -> list[str]:
    weights = recipe.ranking.sample_weights
    return [
        f"{task.name}={task.label_name}"
        + (f"*{weights[task.name]}" if task.name in weights else "")
        for task in recipe.ranking.tasks
    ]
