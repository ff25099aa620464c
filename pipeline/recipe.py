"""Loading a recipe: YAML in, a checked `Recipe` out, with errors that name the place."""

import re
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from embedding.errors import UserError, nearest_name
from embedding.files import write_durably
from embedding.yaml_text import load_yaml
from pipeline.config import Recipe

RECIPES = Path(__file__).parent / "recipes"
RECIPE_FILE = "recipe.yaml"
"""Of a run and of a training: the recipe with all overrides, as it was run."""


def recipe_names() -> list[str]:
    """Names of the recipes that come with Braid."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def find_recipe(name_or_path: str) -> Path:
    """Path of a built-in recipe or of a YAML file.

    Raises:
        UserError: It is neither.
    """
    if name_or_path.endswith((".yaml", ".yml")):
        path = Path(name_or_path)
        if not path.is_file():
            raise UserError(f"recipe file {name_or_path} does not exist; check the path")
        return path
    path = RECIPES / f"{name_or_path}.yaml"
    if not path.is_file():
        raise UserError(
            f"there is no recipe {name_or_path!r}{nearest_name(name_or_path, recipe_names())}; "
            f"built-in recipes are {', '.join(recipe_names())}, or give the path of a .yaml file"
        )
    return path


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe.

    Args:
        name_or_path: A built-in recipe's name, or a YAML file.
        overrides: `a.b.c=value` each; values are YAML; list entries are addressed by their
            `name` or index, as in `features.tables.item.embedding_dim=32`; `a.b+=value` adds an
            entry to a list.

    Raises:
        UserError: Anything wrong, every fault with its YAML path, value and remedy.
    """
    path = find_recipe(name_or_path)
    data = load_yaml(path.read_text(), path.name)
    if not isinstance(data, dict):
        raise UserError(f"{path.name} must be a mapping of recipe keys; see `braid schema`")
    for override in overrides:
        apply_override(data, override)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        faults = [_sentence(fault, data) for fault in error.errors()]
        source = f"recipe {path.name}" + (" with --set" if overrides else "")
        raise UserError(f"{source}: " + "\n  ".join(faults)) from error


def write_recipe(recipe: Recipe, directory: Path) -> None:
    """Write the `recipe.yaml` of a directory."""
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    write_durably(directory / RECIPE_FILE, text)


def read_recipe(directory: Path) -> Recipe:
    """The recipe that was written into a directory.

    Raises:
        UserError: it is damaged, or of another version of Braid.
    """
    path = directory / RECIPE_FILE
    again = "run the date again, which writes it anew"
    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read ({_first_line(error)}); {again}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} is damaged: it holds no mapping of recipe keys; {again}")
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        fault = _sentence(error.errors()[0], data)
        raise UserError(
            f"{path} was cut off, or is of another version of Braid ({fault}); {again}"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set one `a.b.c=value`, or add an entry by `a.b+=value`, in place.

    Raises:
        UserError: No `=`, or the path goes through something that is not there.
    """
    path, separator, text = override.partition("=")
    adds = path.endswith("+")
    path = path.removesuffix("+")
    if not separator or not path:
        raise UserError(
            f"--set {override!r}: write it as path.to.key=value, or path.to.list+=value"
        )
    value = load_yaml(text, f"--set {override!r}: {text!r}")
    *parents, last = path.split(".")
    node: Any = data
    for part in parents:
        node = _child(node, part, override)
    if adds:
        entries = _child(node, last, override) or []
        if not isinstance(entries, list):
            raise UserError(f"--set {override!r}: {path} is no list; += adds an entry to one")
        value = [*entries, value]
    if isinstance(node, list):
        node[_index(node, last, override)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise UserError(f"--set {override!r}: {'.'.join(parents)} is a value and has no keys")


def _child(node: Any, part: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, override)]
    if isinstance(node, dict):
        if node.get(part) is None:
            node[part] = {}
        return node[part]
    raise UserError(f"--set {override!r}: nothing lies below {part!r}")


def _index(node: list[Any], part: str, override: str) -> int:
    names = [entry.get("name") if isinstance(entry, dict) else None for entry in node]
    if part in names:
        return names.index(part)
    if part.isdigit() and int(part) < len(node):
        return int(part)
    known = [str(name) for name in names if name is not None]
    raise UserError(
        f"--set {override!r}: the list has no entry {part!r}{nearest_name(part, known)}; "
        f"use an index below {len(node)} or one of {known}"
    )


def _sentence(fault: ErrorDetails, data: Any) -> str:
    where = _yaml_path(fault["loc"], data)
    match fault["type"]:
        case "extra_forbidden":
            key = str(fault["loc"][-1])
            allowed = _keys_at(Recipe, fault["loc"][:-1])
            hint = nearest_name(key, allowed) or f"; allowed are {', '.join(allowed)}"
            if "kind" in allowed:
                section = where.rpartition(".")[0]
                hint += f"; if it is of another kind, replace all of {section} by {{kind: ...}}"
            return f"{where}: unknown key{hint}"
        case "missing":
            return f"{where}: required, but not there; add it"
        case "union_tag_invalid":
            kind = str(fault["ctx"]["tag"])
            kinds = re.findall(r"'([^']+)'", fault["ctx"]["expected_tags"])
            listed = ", ".join(repr(allowed) for allowed in kinds)
            hint = nearest_name(kind, kinds)
            return f"{where}.kind: {kind!r} is unknown{hint}; allowed are {listed}"
        case "union_tag_not_found":
            listed = ", ".join(_kinds_at(Recipe, fault["loc"]))
            return f"{where}.kind: required, but not there; add one of {listed}"
        case "value_error":
            message = fault["msg"].removeprefix("Value error, ")
            return f"{where}: {message}" if where else message
        case "model_attributes_type" | "model_type" | "dict_type" if kinds := _kinds_at(
            Recipe, fault["loc"]
        ):
            found = fault["input"]
            kind = found if found in kinds else " | ".join(kinds)
            return f"{where}: a section and not {found!r}; write {{kind: {kind}}}"
        case _:
            return f"{where}: {fault['msg']}; got {fault['input']!r}"


def _yaml_path(loc: tuple[int | str, ...], data: Any) -> str:
    """The path as the user sees it: union tags that pydantic inserts are left out."""
    parts: list[str] = []
    node = data
    for index, part in enumerate(loc):
        if isinstance(node, dict) and part not in node and node.get("kind") == part:
            continue
        if isinstance(node, dict):
            node = node.get(part)
        elif isinstance(node, list) and isinstance(part, int) and part < len(node):
            node = node[part]
            name = node.get("name") if isinstance(node, dict) else None
            if name is not None and index < len(loc) - 1:
                part = str(name)
        parts.append(str(part))
    return ".".join(parts)


def _keys_at(annotation: Any, loc: tuple[int | str, ...]) -> list[str]:
    """Keys allowed at a location of the model tree; [] where there are none."""
    if get_origin(annotation) is Annotated:
        return _keys_at(get_args(annotation)[0], loc)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if not loc:
            return sorted(annotation.model_fields)
        field = annotation.model_fields.get(str(loc[0]))
        if field is not None:
            return _keys_at(field.annotation, loc[1:])
        # A tagged union's tag: the member was chosen already.
        return _keys_at(annotation, loc[1:]) if _kind(annotation) == loc[0] else []
    if get_origin(annotation) in (Union, UnionType):
        for member in get_args(annotation):
            if not loc or _kind(member) in (None, loc[0]):
                keys = _keys_at(member, loc)
                if keys:
                    return keys
        return []
    if get_origin(annotation) is tuple and loc and isinstance(loc[0], int):
        return _keys_at(get_args(annotation)[0], loc[1:])
    return []


def _kinds_at(annotation: Any, loc: tuple[int | str, ...]) -> list[str]:
    """Kinds that a tagged union at a location of the model tree is made of."""
    if get_origin(annotation) is Annotated:
        return _kinds_at(get_args(annotation)[0], loc)
    if get_origin(annotation) in (Union, UnionType):
        return [kind for member in get_args(annotation) for kind in _kinds_at(member, loc)]
    if get_origin(annotation) is tuple and loc and isinstance(loc[0], int):
        return _kinds_at(get_args(annotation)[0], loc[1:])
    kind = _kind(annotation)
    if not loc:
        return [] if kind is None else [kind]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        field = annotation.model_fields.get(str(loc[0]))
        if field is not None:
            return _kinds_at(field.annotation, loc[1:])
        return _kinds_at(annotation, loc[1:]) if kind == loc[0] else []
    return []


def _kind(annotation: Any) -> str | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        field = annotation.model_fields.get("kind")
        if field is not None and get_origin(field.annotation) is Literal:
            return str(get_args(field.annotation)[0])
    return None
