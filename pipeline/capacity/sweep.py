"""The command line's words for a capacity study, checked and turned into a request."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from embedding.errors import UserError, nearest_name
from embedding.limits import check_support
from embedding.planning.calibration import constants_for, read_calibration, suits
from embedding.planning.cluster_shape import MACHINE_PATTERN, ClusterShape, limited, parse_shape
from multimodal.content_config import ContentConfig, Service
from pipeline.capacity.types import CapacityRequest, Target
from pipeline.config import Recipe
from pipeline.planning.request import measured_traffic, with_traffic
from pipeline.planning.reserve import require_towers
from ranking.compatibility import table_widths

_RANGE = re.compile(rf"^{MACHINE_PATTERN}:(?P<low>\d+)\.\.(?P<high>\d+)(?P<ranks>x\d+)?$")


@dataclass(frozen=True)
class SweepOptions:
    """As typed."""

    topologies: tuple[str, ...]
    batch_sizes: tuple[int, ...] = ()
    growth: tuple[float, ...] = ()
    """Beside today's rows, which are always in the sweep."""
    dims: tuple[float, ...] = ()
    """Beside today's."""
    rows_per_s: float | None = None
    rows_per_day: float | None = None
    window_hours: float = 4.0
    growth_per_day: float | None = None
    traffic: Path | None = None
    calibrations: tuple[Path, ...] = ()
    prices: tuple[str, ...] = ()
    dense_flops_per_row: float | None = None


def sweep_request(recipe: Recipe, options: SweepOptions) -> CapacityRequest:
    """A request of the recipe's tables and these options.

    Raises:
        UserError: A topology or price is none, a factor is not positive, a file is missing, stale
            or of other tables or machines, a setting cannot run on a topology's devices, or a tower
            of the content is not on this machine.
    """
    recipe = with_traffic(recipe, options.traffic)
    shapes = tuple(shape for text in options.topologies for shape in expand(text))
    priced = _with_prices(shapes, options.prices)
    _check_files(recipe, options, shapes)
    _check_devices(recipe, shapes)
    if recipe.content is not None:
        _check_content(recipe.content, shapes)
    try:
        return CapacityRequest(
            recipe=recipe,
            shapes=tuple(limited(s, recipe.embedding.sharding.hbm_gib) for s in priced),
            batch_sizes=options.batch_sizes or (recipe.ranking.trainer.batch_size_per_rank,),
            growth=_with_today(options.growth),
            dim_factors=_with_today(options.dims),
            target=Target(
                rows_per_s=options.rows_per_s,
                rows_per_day=options.rows_per_day,
                epochs=recipe.ranking.trainer.epochs,
                window_hours=options.window_hours,
            ),
            calibrations=options.calibrations,
            growth_per_day=options.growth_per_day,
            kernels=recipe.embedding.sharding.kernels,
            dense_flops_per_row=options.dense_flops_per_row,
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(part for part in first["loc"] if isinstance(part, str))
        raise UserError(f"capacity: {where}: {first['msg']}; got {first['input']!r}") from error


def _with_today(factors: tuple[float, ...]) -> tuple[float, ...]:
    """The answer is about the tables as they are, so 1 is always there; each factor once."""
    return tuple(dict.fromkeys((1.0, *factors)))


def _check_files(recipe: Recipe, options: SweepOptions, shapes: tuple[ClusterShape, ...]) -> None:
    """Before anything is started: a file of another machine or version ends the study."""
    measured_traffic(recipe)
    for path in options.calibrations:
        made = read_calibration(path)
        of = [s for s in shapes if made.machine in (s.machine.name, s.machine.base)]
        if not of:
            machines = sorted({shape.machine.name for shape in shapes})
            raise UserError(
                f"calibration {path} is of {made.machine!r}, which no topology of the sweep has "
                f"({', '.join(machines)}); leave it out"
            )
        suited = [shape for shape in of if suits(made, shape.machine)]
        constants_for((suited or of)[0], path)
    own = recipe.embedding.sharding.calibration
    if own is not None:
        made = read_calibration(own)
        first = next((shape for shape in shapes if suits(made, shape.machine)), None)
        if first is not None:
            constants_for(first, own)


def _check_devices(recipe: Recipe, shapes: tuple[ClusterShape, ...]) -> None:
    """Before anything is started: no plan makes a kind of device run what it cannot."""
    schema, plane = table_widths(recipe.features, recipe.ranking.model), recipe.embedding
    first_of_kind = {shape.machine.device: shape for shape in reversed(shapes)}
    for device, shape in first_of_kind.items():
        try:
            check_support(schema, plane.optimizer, plane.sharding, device)
        except UserError as error:
            raise UserError(
                f"topology {shape.name}: {error}, or leave topologies of {device} out"
            ) from error


def _check_content(content: ContentConfig, shapes: tuple[ClusterShape, ...]) -> None:
    """Before anything is started."""
    require_towers(content)
    placement = content.placement
    if isinstance(placement, Service) and placement.gpus_per_actor:
        without = [shape.name for shape in shapes if shape.machine.device == "cpu"]
        if without:
            raise UserError(
                f"content.placement.gpus_per_actor={placement.gpus_per_actor:g}: actors are taken "
                f"to have GPUs like those of the ranks, and {without[0]} has none; set it to 0, or "
                "leave that topology out"
            )
    if isinstance(placement, Service) and placement.transport == "direct":
        for shape in shapes:
            obstacle = placement.obstacle(ranks_on_gpu=shape.machine.device == "cuda")
            if obstacle is not None:
                raise UserError(
                    f"content.placement.transport=direct: on {shape.name} {obstacle}; set "
                    "gpus_per_actor to 1, or transport to auto, or leave that topology out"
                )


def expand(text: str) -> Iterator[ClusterShape]:
    """`h200:1..16x8` is 1, 2, 4, 8 and 16 hosts of 8; `cpu:1..4` is 1, 2 and 4 ranks.

    Raises:
        UserError: No such topology.
    """
    match = _RANGE.match(text)
    if match is None:
        yield parse_shape(text)
        return
    low, high = int(match["low"]), int(match["high"])
    if low < 1 or high < low:
        raise UserError(f"topology {text!r}: a range goes from at least 1 upwards, as h200:1..16x8")
    number = low
    while number < high:
        yield parse_shape(f"{match['name']}:{number}{match['ranks'] or ''}")
        number *= 2
    yield parse_shape(f"{match['name']}:{high}{match['ranks'] or ''}")


def _with_prices(
    shapes: tuple[ClusterShape, ...], prices: tuple[str, ...]
) -> tuple[ClusterShape, ...]:
    by_name: dict[str, float] = {}
    names = sorted({shape.machine.name for shape in shapes})
    for text in prices:
        name, separator, value = text.partition("=")
        try:
            by_name[name] = float(value)
        except ValueError:
            separator = ""
        if not separator or by_name.get(name, -1.0) < 0:
            raise UserError(f"--price {text!r}: write it as h200=80, of one host and hour")
        if name not in names:
            raise UserError(
                f"--price {text!r}: no topology of the sweep is of {name!r}"
                f"{nearest_name(name, names)}; they are of {', '.join(names)}"
            )
    return tuple(
        shape.model_copy(
            update={
                "machine": shape.machine.model_copy(
                    update={"price_per_hour": by_name[shape.machine.name]}
                )
            }
        )
        if shape.machine.name in by_name
        else shape
        for shape in shapes
    )
