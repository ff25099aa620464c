"""Names that a recipe gives: what they may hold, and which of them PyTorch has taken."""

import re
from typing import Annotated

from pydantic import AfterValidator, Field


def _check_name(name: str) -> str:
    if re.fullmatch(NAME_PATTERN, name) is None:
        raise ValueError(
            f"{name!r} is no name; use letters, digits, _ and -, and name the data's column by a "
            "key of its own (`column`, `label`)"
        )
    return name


NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9_-]*"
Name = Annotated[
    str, AfterValidator(_check_name), Field(json_schema_extra={"pattern": f"^{NAME_PATTERN}$"})
]
"""Of a table, feature, history, sequence or task: part of paths and of columns."""

TAKEN_NAMES = frozenset(
    [
        "T_destination",
        "add_module",
        "apply",
        "bfloat16",
        "buffers",
        "call_super_init",
        "children",
        "clear",
        "compile",
        "cpu",
        "cuda",
        "double",
        "dump_patches",
        "eval",
        "extra_repr",
        "float",
        "forward",
        "get_buffer",
        "get_extra_state",
        "get_parameter",
        "get_submodule",
        "half",
        "ipu",
        "items",
        "keys",
        "load_state_dict",
        "modules",
        "mtia",
        "named_buffers",
        "named_children",
        "named_modules",
        "named_parameters",
        "parameters",
        "pop",
        "register_backward_hook",
        "register_buffer",
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
        "register_load_state_dict_post_hook",
        "register_load_state_dict_pre_hook",
        "register_module",
        "register_parameter",
        "register_state_dict_post_hook",
        "register_state_dict_pre_hook",
        "requires_grad_",
        "set_extra_state",
        "set_submodule",
        "share_memory",
        "state_dict",
        "to",
        "to_empty",
        "train",
        "training",
        "type",
        "update",
        "values",
        "xpu",
        "zero_grad",
    ]
)
"""Attributes of `torch.nn.ModuleDict`, which takes no module by these names."""


def _check_module_name(name: str) -> str:
    if name in TAKEN_NAMES:
        raise ValueError(
            f"{name!r} is the name of a method of PyTorch's modules, and they take no table or "
            f"history of it; call it `{name}_`, say: features and columns may keep their names"
        )
    return name


ModuleName = Annotated[Name, AfterValidator(_check_module_name)]
"""Of a table or history, by which modules are registered."""
