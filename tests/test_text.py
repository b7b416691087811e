import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcnn.text import file_stem, parse_json, printable


@given(st.text(alphabet=st.characters(exclude_categories=[])))
def test_printable_text_prints_and_is_printable_already(text: str) -> None:
    assert printable(text).isprintable()
    assert printable(printable(text)) == printable(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("plain ü", "plain ü"), ("a\x1b[31mb", "a\\x1b[31mb"), ("a\u202eb", "a\\u202eb"), ("a\udcff", "a\\udcff")],
)
def test_what_would_move_the_cursor_is_escaped(text: str, expected: str) -> None:
    assert printable(text) == expected


@given(st.lists(st.text(alphabet=st.characters(exclude_categories=[])), min_size=2, max_size=5))
def test_file_stems_are_different_short_and_stay_in_their_folder(names: list[str]) -> None:
    stems = [file_stem(label, name) for label, name in enumerate(names)]
    assert len(set(stems)) == len(stems)
    for stem in stems:
        assert len(stem.encode()) < 100
        assert not set(stem) & set('/\\:*?"<>|\0')
        assert stem.isprintable()


@pytest.mark.parametrize(
    ("label", "name", "expected"),
    [
        (9, "Ankle boot", "009-Ankle boot"),
        (0, "T-shirt/top", "000-T-shirt-top"),
        (12345, "..", "12345"),
        (1, "雪" * 84, "001-" + "雪" * 26),
    ],
)
def test_file_stems_can_be_read(label: int, name: str, expected: str) -> None:
    assert file_stem(label, name) == expected


@pytest.mark.parametrize(
    ("text", "fault"),
    [("[" * 200_000, "nested too deeply"), ('{"a": 1, "a": 2}', "names 'a' twice"), ("{", "Expecting")],
)
def test_json_that_cannot_be_meant_is_a_value_error(text: str, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        parse_json(text)


def test_json_is_parsed() -> None:
    assert parse_json(json.dumps({"a": [1, {"b": None}]})) == {"a": [1, {"b": None}]}
