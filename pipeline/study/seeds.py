"""What a study draws anew with every seed, and what it holds equal for all of its variants."""

from collections.abc import Mapping
from typing import Any

from embedding.errors import UserError
from pipeline.config import ClusterConfig, EvaluationConfig, Recipe


def require_comparable(recipes: Mapping[str, Recipe]) -> None:
    """Refuse variants that change what a study holds equal.

    That is the cluster, the seeds, the data, and the rows and labels that variants are evaluated
    on.

    Raises:
        UserError: the variant, the setting, and what to do.
    """
    first_name = next(iter(recipes))
    first = recipes[first_name]
    for name, recipe in recipes.items():
        for key in ClusterConfig.model_fields:
            own, theirs = getattr(recipe.cluster, key), getattr(first.cluster, key)
            if own != theirs:
                raise UserError(
                    f"variant {name!r}: cluster.{key} is {own}, but {theirs} in {first_name!r}; "
                    "the trials of a study run on one kind of worker, side by side: leave it out "
                    f"of the variants and set it for all with --set cluster.{key}=..., or run two "
                    "studies, each with an --out of its own"
                )
        seed = recipe.ranking.trainer.seed
        if seed != first.ranking.trainer.seed:
            raise UserError(
                f"variant {name!r}: ranking.trainer.seed is {seed}, but "
                f"{first.ranking.trainer.seed} in {first_name!r}; a study gives every variant the "
                "same seeds: leave it out of the variants, and set the first seed for all with "
                "--set ranking.trainer.seed=..."
            )
        _require_same_data((name, recipe), (first_name, first))
        _require_same_evaluation((name, recipe), (first_name, first))


def require_drawn_codes(recipes: Mapping[str, Recipe], num_seeds: int) -> None:
    """Refuse codes that stay what they are while every seed holds out other items.

    Raises:
        UserError: the variant, and what to do.
    """
    for name, recipe in recipes.items():
        codes, held_out = recipe.codes, recipe.evaluation.held_out_items
        if num_seeds > 1 and held_out is not None and codes is not None and codes.taken_from:
            raise UserError(
                f"variant {name!r}: with evaluation.held_out_items each of the {num_seeds} seeds "
                f"holds out other items, and the codes of codes.taken_from={codes.taken_from} were "
                "made with one draw of them: the others are known to their codebooks; leave "
                "codes.taken_from out, so that every seed makes its own codes, or compare with "
                "--seeds 1"
            )


def _require_same_evaluation(variant: tuple[str, Recipe], first: tuple[str, Recipe]) -> None:
    name, recipe = variant
    own, theirs = (_evaluated_on(each) for _, each in (variant, first))
    for key, value in own.items():
        # A task of one variant alone is compared with nothing.
        if value != theirs.get(key, value):
            raise UserError(
                f"variant {name!r}: {key} is {value}, but {theirs[key]} in {first[0]!r}; a study "
                "compares figures of the same rows and labels, trial by trial: leave it out of the "
                "variants and set it for all with --set, or run two studies, each with an --out of "
                "its own"
            )


def _evaluated_on(recipe: Recipe) -> dict[str, Any]:
    """What decides which rows, labels, weights and groups a metric is of, by path."""
    found: dict[str, Any] = {"window.eval_days": recipe.window.eval_days}
    for key in EvaluationConfig.model_fields:
        found[f"evaluation.{key}"] = getattr(recipe.evaluation, key)
    weights = recipe.ranking.sample_weights
    for task in recipe.ranking.tasks:
        found[f"label of task {task.name!r}"] = task.label_name
        found[f"sample_weight of task {task.name!r}"] = weights.get(task.name)
    return found


def _require_same_data(variant: tuple[str, Recipe], first: tuple[str, Recipe]) -> None:
    """Trials of other rows are no pair, however equal their seeds are."""
    (name, recipe), (first_name, theirs) = variant, first
    where = None
    if recipe.data.root.absolute() != theirs.data.root.absolute():
        where = f"data.root is {recipe.data.root}, but {theirs.data.root} in {first_name!r}"
    elif recipe.data.synthetic != theirs.data.synthetic:
        where = f"data.synthetic differs from that of {first_name!r}"
    if where is not None:
        raise UserError(
            f"variant {name!r}: {where}; a study compares variants on the same rows, trial by "
            "trial: leave it out of the variants and set it for all with --set, or run two "
            "studies, each with an --out of its own"
        )


def with_seed(recipe: Recipe, seed: int) -> Recipe:
    """The recipe as a trial runs it: everything that is drawn is drawn anew with every seed.

    Also which items are held out, the alignment and the codebooks that codes come from, and the
    order in which a generator reads the fields. The first seed's trial is the recipe itself.
    """
    ranking = recipe.ranking
    offset = seed - ranking.trainer.seed
    model, generator = ranking.model, ranking.model.generator
    if generator is not None and generator.shuffle_seed is not None:
        drawn = {"shuffle_seed": generator.shuffle_seed + offset}
        model = model.model_copy(update={"generator": generator.model_copy(update=drawn)})
    trainer = ranking.trainer.model_copy(update={"seed": seed})
    changes: dict[str, Any] = {
        "ranking": ranking.model_copy(update={"model": model, "trainer": trainer})
    }
    content = recipe.content
    if content is not None:
        changes["content"] = content.model_copy(update={"seed": content.seed + offset})
    if recipe.codes is not None:
        changes["codes"] = recipe.codes.with_seed_offset(offset)
    held_out = recipe.evaluation.held_out_items
    if held_out is not None:
        other = held_out.model_copy(update={"seed": held_out.seed + offset})
        changes["evaluation"] = recipe.evaluation.model_copy(update={"held_out_items": other})
    return recipe.model_copy(update=changes)
