"""Alignment on whatever text Hypothesis can think of, against a loop over bytes."""

from itertools import product

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.test_alignment import MAKERS, check, encode, side
from trl_kd.data import align


# Any text of Unicode, and such of pieces that tokenizers treat in their own ways
PIECES = [
    "the",
    " fox",
    "\n",
    "\n\n",
    "\t",
    "  ",
    " ",
    "…",
    "👩‍🚀",
    "é",
    "e\u0301",
    "你好",
    "ß",
    "İ",
    "ﬁ",
    "1234",
    "'s",
    "\r\n",
    "\u200b",
]
TEXTS = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(PIECES), max_size=25).map("".join))
CALM = settings(
    max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.mark.parametrize(("student", "teacher"), product(MAKERS, repeat=2))
def test_align_any_text_gives_pairs_of_equal_bytes_at_the_same_place(student, teacher):
    (tokenizer, tokens), (teacher_tokenizer, teacher_tokens) = side(student), side(teacher)

    @CALM
    @given(text=TEXTS)
    def agrees(text):
        check(tokens, teacher_tokens, encode(tokenizer, text), encode(teacher_tokenizer, text))

    agrees()


@pytest.mark.parametrize("name", MAKERS)
def test_align_any_ids_with_themselves_is_the_identity(name):
    tokens = side(name)[1]
    ids_of = st.lists(st.integers(0, len(tokens.table) - 1), max_size=40)

    @CALM
    @given(ids=ids_of)
    def aligns_itself(ids):
        pairs = align(tokens, tokens, ids, ids).tolist()
        assert all(i == j for i, j in pairs)
        assert {i for i, _ in pairs} >= {i for i, token in enumerate(ids) if tokens.table[token].strip()}

    aligns_itself()


def test_align_by_context_texts_that_begin_or_space_differently():
    tokenizer, tokens = side("bytes")

    def ids_of(*pieces):
        return [i for piece in pieces for i in encode(tokenizer, piece)]

    def paired(ours, theirs):
        return align(tokens, tokens, ours, theirs, by="context").tolist()

    # A line break that only one template writes: what follows it has the same text behind
    assert paired(ids_of("\n", "a", "b"), ids_of("a", "b")) == [[1, 0], [2, 1]]
    # After another kind of white space, the text before is another one
    assert paired(ids_of("a", "\n", "b"), ids_of("a", "\t", "b")) == [[0, 0], [1, 1]]
