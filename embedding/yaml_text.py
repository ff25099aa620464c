"""YAML in which a mapping has every key once; YAML itself lets the last one win in silence."""

from typing import Any

import yaml

from embedding.errors import UserError

_DATE = "tag:yaml.org,2002:timestamp"


def load_yaml(text: str, where: str) -> Any:
    """The data of a YAML text.

    Args:
        text: one document.
        where: names the text in errors.

    Raises:
        UserError: it is no YAML, sets a key twice, or has a date that is none.
    """
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, (), where, set())
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not valid YAML: {error}") from error


def _check(node: yaml.Node, path: tuple[str, ...], where: str, seen: set[int]) -> None:
    """Refuse repeated keys, and what YAML takes for a date and Python does not."""
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode) and node.tag == _DATE:
        try:
            yaml.SafeLoader.construct_yaml_timestamp(yaml.SafeLoader(""), node)
        except ValueError as error:
            key = f"{'.'.join(path)}: " if path else ""
            raise UserError(
                f"{where}, line {node.start_mark.line + 1}: {key}{node.value!r} is no date, as "
                f"{error}; write YYYY-MM-DD"
            ) from error
    if isinstance(node, yaml.SequenceNode):
        for i, entry in enumerate(node.value):
            _check(entry, (*path, str(i)), where, seen)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[tuple[str, str], int] = {}
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if (key.tag, name) in lines:
            raise UserError(
                f"{where}, line {line}: {'.'.join((*path, name))} is set a second time (first in "
                f"line {lines[key.tag, name]}); keep one of them"
            )
        lines[key.tag, name] = line
        _check(value, (*path, name), where, seen)
