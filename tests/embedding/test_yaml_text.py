"""Every key once; all else as YAML has it."""

import pytest
import yaml

from embedding.errors import UserError
from embedding.yaml_text import load_yaml

SOUND = """
base: &base {a: 1, b: [x, {c: 2}]}
other:
  <<: *base
  a: 3
  1: number
  "1": text
again: *base
"""


@pytest.mark.parametrize("text", [SOUND, "", "[1, 2.5, null, 2024-01-01]", "x"])
def test_sound_text_is_read_as_ever(text: str) -> None:
    assert load_yaml(text, "here") == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a: 1\nb: 2\na: 3",
            r"^here, line 3: a is set a second time \(first in line 1\); keep one",
        ),
        ("t:\n- {n: x}\n- n: x\n  k: {m: 1, m: 1}", r"line 4: t\.1\.k\.m is set a second"),
        (
            "t:\n- a: {b: 2024-13-01}",
            r"^here, line 2: t\.0\.a\.b: '2024-13-01' is no date, .* write",
        ),
        ("2024-02-30", "^here, line 1: '2024-02-30' is no date"),
        ("a: [", "^here is not valid YAML: "),
        ("a: !!python/object:os.system x", "^here is not valid YAML: "),
        ("a: \x00", "^here is not valid YAML: "),
    ],
)
def test_faults_are_named(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_yaml(text, "here")
