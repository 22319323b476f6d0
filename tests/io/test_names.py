"""Names of strangers: what is shown of them, and which are refused."""

import pytest

from remap.io.names import name_problem, plain


@pytest.mark.parametrize("c", ["\x1b", "\n", "\x7f", "\u2028", "\u202e", "\u200f", "\u2066"], ids=ascii)
def test_control_and_direction_characters_are_escaped_and_refused(c: str) -> None:
    """Source: repr, which escapes what is not printable."""
    text = f"a{c}b"
    assert plain(text) == repr(text)[1:-1] != text
    assert name_problem(text) == f"the control character {c!r}"


@pytest.mark.parametrize("text", ["Öl", "猫", "گربه‌ها", "a b"], ids=ascii)
def test_letters_of_any_script_are_names(text: str) -> None:
    assert name_problem(text) is None
