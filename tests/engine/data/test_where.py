"""`--where`: what it accepts, what it refuses to run."""

import math

import pytest
from harmony_fast.engine.data.images import Rejected
from harmony_fast.engine.data.where import Where
from harmony_fast.engine.errors import DataError
from hypothesis import given
from hypothesis import strategies as st

SAMPLE = {
    "punsafe": 0.2, "similarity": 0.3, "NSFW": "UNLIKELY", "width": 640, "height": 480, "caption": "A small Cat",
    "none": None, "nan": math.nan, "text": "0.5", "flag": True, "list": ["a", "b"], "word": "many",
}  # fmt: skip


def accepts(text: str, **more: object) -> bool | None:
    try:
        Where(text).require({**SAMPLE, **more})
    except Rejected as rejected:
        return None if "no usable" in str(rejected) else False
    return True


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("punsafe < 0.3 and similarity > 0.25 and NSFW != 'NSFW'", True),
        ("punsafe >= 0.3 or NSFW == 'NSFW'", False),
        ("not (punsafe > 0.5)", True),
        ("0.1 < punsafe <= 0.2 < similarity", True),
        ("NSFW in ('UNLIKELY', 'UNSURE')", True),
        ("NSFW not in ['UNLIKELY']", False),
        ("'Cat' in caption and 'cat' not in caption and 'cat' in lower(caption)", True),
        ("matches(caption, 'sm.ll') and not matches(caption, '^small')", True),
        ("len(caption) == 11 and len(list) == 2", True),
        ("width / height > 1.3 and width * height >= 640 * 480 and width % 2 == 0 and -width < +height - 1", True),
        ("width / 0 > 1", None),
        ("text > 0.4 and text < 0.6", True),  # tables of text spell numbers
        ("word > 0.4", None),
        ("flag == True and flag", True),
        ("none is None and punsafe is not None", True),
        ("missing is None", True),
        ("missing > 1", None),
        ("missing > 1 or punsafe < 1", True),
        ("missing > 1 and punsafe > 1", False),
        ("not (nan < 1)", None),
        ("caption < 3", None),
        ("list < 'a'", None),
        ("punsafe in caption", None),
    ],
)
def test_conditions(text: str, expected: bool | None) -> None:
    assert accepts(text) is expected


def test_the_reason_names_what_was_missing() -> None:
    with pytest.raises(Rejected, match=r"left out by --where: no usable missing, nan$"):
        Where("missing > 1 and nan > 1 and width > 1").require(SAMPLE)
    assert Where("a > 1 and b < c or lower(d) == 'x'").names == {"a", "b", "c", "d"}


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')", "open('x')", "().__class__", "caption.upper()", "list[0]", "lambda: 1",
        "[x for x in list]", "f'{caption}'", "width ** 9", "width << 9", "a := 1", "1 if flag else 2", "len()",
        "len(caption, 1)", "matches(caption, word)", "matches(caption, '(')", "punsafe is 1", "punsafe = 1", "a b", "",
        "b'x' == caption", "(" * 500, "len(obj=caption)", "matches(*list)", "...", "{'a': 1}", "~width",
    ],
)  # fmt: skip
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="--where") as error:
        Where(text)
    assert "\n" not in str(error.value)


@given(st.text(max_size=30), st.dictionaries(st.sampled_from("abc"), st.none() | st.floats() | st.text(max_size=3)))
def test_no_text_does_anything_but_be_refused_or_decide(text: str, columns: dict[str, object]) -> None:
    try:
        Where(text).require(columns)
    except (DataError, Rejected) as error:
        assert str(error)
