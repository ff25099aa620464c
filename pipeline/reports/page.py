"""Pages: templates of `pipeline/templates`, filled in and written in one move."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from embedding.files import write_durably


def render(template: str, **values: Any) -> str:
    """Fill a template in; a value that it asks for and does not get is an error."""
    environment = Environment(
        loader=PackageLoader("pipeline"), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template(template).render(**values)


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Write a filled template."""
    write_durably(path, render(template, **values))
    return path
