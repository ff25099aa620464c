"""The reference of a recipe as one Markdown page, made from the JSON schema of its models.

A section is a model, at the first path that leads to it; later paths link there. Descriptions are
the docstrings of classes and fields.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from pipeline.config import Recipe

HEAD = """# The recipe, key by key

`braid schema --markdown` prints this page from the models that check a recipe; a test compares.
`braid schema` prints them as a JSON schema. A key without a default is required. `null` switches an
optional part off, or leaves the choice to Braid.
"""
BOUNDS = {
    "minimum": ">=",
    "exclusiveMinimum": ">",
    "maximum": "<=",
    "exclusiveMaximum": "<",
    "multipleOf": "a multiple of",
}
Schema = dict[str, Any]


def recipe_page() -> str:
    """The page."""
    return HEAD + "".join(_Page(Recipe.model_json_schema()).sections())


class _Page:
    def __init__(self, schema: Schema) -> None:
        self.root = schema
        self.models: dict[str, Schema] = schema["$defs"]
        self.paths: dict[str, str] = {}
        """Where each model is described."""

    def sections(self) -> Iterator[str]:
        yield self._table(self.root, "")
        yield from self._below(self.root, "")

    def _below(self, model: Schema, path: str) -> Iterator[str]:
        """Sections of the models that the keys of a model lead to, each followed by its own."""
        for key, value in model["properties"].items():
            here = f"{path}.{key}".lstrip(".")
            names = [name for name in _references(value) if self.paths.get(name) == here]
            if not names:
                continue
            yield f"\n{'##' if not path else '###'} `{here}`\n"
            for name in names:
                found = self.models[name]
                kind = found["properties"].get("kind", {}).get("const")
                lead = f"**`kind: {kind}`** " if kind else ""
                yield f"\n{lead}{_description(found)}\n"
                yield self._table(found, here)
            for name in names:
                yield from self._below(self.models[name], here)

    def _table(self, model: Schema, path: str) -> str:
        rows = {k: v for k, v in model["properties"].items() if not (k == "kind" and "const" in v)}
        for key, value in rows.items():
            for name in _references(value):
                self.paths.setdefault(name, f"{path}.{key}".lstrip("."))
        lines = [
            f"| `{key}` | {self._type(value)} | {_default(value)} | {_description(value)} |"
            for key, value in rows.items()
        ]
        head = ["", "| key | type | default | what |", "|---|---|---|---|"]
        return "\n".join([*head, *lines, ""]) if lines else ""

    def _type(self, value: Schema) -> str:
        if "oneOf" in value or "$ref" in value:
            return self._link(_references(value))
        if "anyOf" in value:
            return " or ".join(dict.fromkeys(self._type(part) for part in value["anyOf"]))
        if choices := value.get("enum", [value["const"]] if "const" in value else []):
            return " or ".join(f"`{choice}`" for choice in choices)
        match value.get("type"):
            case "array" if "prefixItems" in value:
                return f"[{', '.join(self._type(part) for part in value['prefixItems'])}]"
            case "array":
                return f"list of {self._type(value['items'])}"
            case "object":
                return f"mapping to {self._type(value['additionalProperties'])}"
            case kind:
                limits = [f"{sign} {value[key]:g}" for key, sign in BOUNDS.items() if key in value]
                return " ".join([str(value.get("format", kind or "any")), *limits])

    def _link(self, names: list[str]) -> str:
        path = self.paths[names[0]]
        anchor = re.sub(r"[^\w-]", "", path)
        kinds = [self.models[name]["properties"].get("kind", {}).get("const") for name in names]
        shown = ", ".join(f"`{kind}`" for kind in kinds if kind) or f"`{path}`"
        return f"[{shown}](#{anchor})"


def _references(value: Any) -> list[str]:
    """Names of the models in a part of the schema, in order."""
    return list(dict.fromkeys(re.findall(r'"\$ref": "#/\$defs/(\w+)"', json.dumps(value))))


def _default(value: Schema) -> str:
    if "default" not in value:
        return ""
    default = value["default"]
    if isinstance(default, dict) and default:
        return f"`{default['kind']}`" if "kind" in default else "its defaults"
    return f"`{default if isinstance(default, str) and default else json.dumps(default)}`"


def _description(value: Schema) -> str:
    return " ".join(value.get("description", "").split()).replace("|", "\\|")
