"""Which tokens of two tokenizers stand for the same bytes of the same text, found from token ids alone."""

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import count
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase


# Where two texts differ in nothing else they count as the same: templates and collapsing tokenizers change it.
WHITE_SPACE = b" \t\n\r\v\f"
_IS_SOLID = np.isin(np.arange(256), list(WHITE_SPACE), invert=True)
# What is matched as a whole where texts differ: a word of ASCII, or one other character.
_WORD = re.compile(rb"[0-9A-Za-z]+|[\x80-\xff][\x80-\xbf]*|\S")
# Pairs of equal words up to which `difflib` takes milliseconds; a text that repeats itself has more.
_MAX_EQUAL_WORDS = 100_000

_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")
# The characters by which GPT-2 writes bytes in its vocabulary: the visible ones of Latin-1 are themselves.
_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [byte for byte in range(256) if byte not in _VISIBLE]
_BYTE_OF = {chr(byte): byte for byte in _VISIBLE} | {chr(256 + i): byte for i, byte in enumerate(_HIDDEN)}


class TokenBytes:
    r"""
    What each token id of a fast tokenizer stands for, in bytes. It is read from the decoder that the tokenizer itself
    declares, so that the ids of a rollout need no text to be placed in, valid UTF-8 or not.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Fast tokenizer: byte-level, SentencePiece-like (BPE or Unigram, with byte fallback or not) or WordPiece.
        eos_token_ids (`Iterable[int]`, *optional*):
            Tokens that end a text, the one that is to stand for all of them first. The tokenizer's own EOS always
            counts as one.

    Attributes:
        table (`list[bytes]`):
            Bytes of each id. Tokens that end a text, other special tokens, unknown tokens and ids without a token have
            none. Tokens that were added but aren't special have those of their content.
        lengths (`np.ndarray` of shape `(V,)`):
            Number of bytes of each id.
        kinds (`np.ndarray` of shape `(V,)`):
            0 for text, 1 for an end of text, from 2 on for other special tokens (the same in every tokenizer that has
            a special token of this content), -1 for ids that are never aligned: unknown tokens and ids without token.
        eos_token_ids (`tuple[int, ...]`):
            The tokens that end a text.
        special (`dict[str, int]`):
            Ids of the special tokens and of those that end a text, by their content.
        ids (`dict[bytes, int]`):
            The lowest id for the bytes of a token; that of a byte-fallback token only if no other has this byte.
        adds_space (`bool`):
            Whether the tokenizer puts a space before a text that stands alone.

    Raises:
        ValueError: If the tokenizer isn't fast, or has a decoder that isn't known.

    Examples:

    ```python
    >>> tokens = TokenBytes(AutoTokenizer.from_pretrained("gpt2"))
    >>> tokens.table[612], tokens.kinds[[612, 50256]]
    (b' there', array([0, 1]))
    ```
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_token_ids: Iterable[int] = ()):
        if not tokenizer.is_fast:
            raise ValueError(
                f"The tokenizer is a `{type(tokenizer).__name__}`, which isn't fast: it doesn't say which bytes its "
                "tokens stand for, so they can't be aligned with another tokenizer's. Load it with `use_fast=True`, "
                "or convert it to a `tokenizer.json`."
            )
        backend = tokenizer.backend_tokenizer
        description = json.loads(backend.to_str())
        steps, model = _decoder_steps(description), description["model"]
        has_byte_tokens = {"type": "ByteFallback"} in steps or model.get("byte_fallback")
        vocabulary, added = backend.get_vocab(with_added_tokens=False), tokenizer.added_tokens_decoder
        eos_token_ids = [*eos_token_ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]
        self.eos_token_ids = tuple(dict.fromkeys(eos_token_ids))
        self.adds_space = _adds_space(description)

        size = 1 + max([len(tokenizer) - 1, *vocabulary.values(), *added, *self.eos_token_ids])
        self.table, self.kinds = [b""] * size, np.full(size, -1)
        byte_tokens = {i for token, i in vocabulary.items() if has_byte_tokens and _BYTE_TOKEN.fullmatch(token)}
        for token, i in vocabulary.items():
            self.table[i] = bytes([int(token[3:5], 16)]) if i in byte_tokens else _piece_bytes(token, steps)
            self.kinds[i] = 0
        for i, token in added.items():
            if token.special:
                self.table[i], self.kinds[i] = b"", _kind(token.content)
            # One that the model has too, such as a run of "▁", is written as the model writes it
            elif vocabulary.get(token.content) != i:
                self.table[i], self.kinds[i] = token.content.encode(), 0
        unknown = {vocabulary.get(model.get("unk_token")), model.get("unk_id")} - {None}
        for ids, kind in ((unknown, -1), (self.eos_token_ids, 1)):
            for i in ids:
                self.table[i], self.kinds[i] = b"", kind

        self.lengths = np.array([len(piece) for piece in self.table], dtype=np.int64)
        self.special = {tokenizer.convert_ids_to_tokens(i): i for i in np.flatnonzero(self.kinds > 0).tolist()}
        # The last to be set wins
        order = sorted(np.flatnonzero(self.lengths).tolist(), key=lambda i: (i in byte_tokens, i), reverse=True)
        self.ids = {self.table[i]: i for i in order}

    def text(self, ids: Iterable[int]) -> bytes:
        """Bytes that the tokens stand for, a space included that the tokenizer puts before a text."""
        size = len(self.table)
        return b"".join([self.table[i] if 0 <= i < size else b"" for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """The same as text, invalid UTF-8 replaced by U+FFFD."""
        return self.text(ids).decode("utf-8", errors="replace")


def _kind(content: str) -> int:
    return 2 + int.from_bytes(hashlib.sha256(content.encode()).digest()[:7])


def _flatten(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A part of a tokenizer's description as the list of its steps."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    parts = next(step[name] for name in ("decoders", "pretokenizers", "normalizers") if name in step)
    return [inner for part in parts for inner in _flatten(part)]


def _decoder_steps(description: dict[str, Any]) -> list[dict[str, Any]]:
    steps = _flatten(description["decoder"])
    is_fused = False
    for step in steps:
        is_known = step["type"] in ("ByteLevel", "ByteFallback", "Fuse", "Metaspace", "WordPiece")
        is_known |= step["type"] == "Replace" and "String" in step["pattern"]
        # What is stripped is the space before a text
        is_known |= step["type"] == "Strip" and is_fused and step["stop"] == 0
        if not is_known:
            break
        is_fused |= step["type"] == "Fuse"
    if not steps or not is_known:
        found = f"the step {json.dumps(step)}" if steps else "no steps"
        raise ValueError(
            f"The decoder of the tokenizer has {found}, which doesn't tell which bytes its tokens stand for, so they "
            "can't be aligned with another tokenizer's. Use a tokenizer whose decoder is byte-level, Metaspace, "
            "WordPiece, or replaces and strips literal text, or a teacher with the student's vocabulary."
        )
    return steps


def _adds_space(description: dict[str, Any]) -> bool:
    steps = [step for part in ("normalizer", "pre_tokenizer", "decoder") for step in _flatten(description[part])]
    if any(step["type"] in ("Prepend", "WordPiece") for step in steps):
        return True
    steps = _flatten(description["pre_tokenizer"])
    return any(
        (step["type"] == "Metaspace" and step["prepend_scheme"] != "never")
        or (step["type"] == "ByteLevel" and step["add_prefix_space"])
        for step in steps
    )


def _piece_bytes(piece: str, steps: list[dict[str, Any]]) -> bytes:
    """Bytes of a token of the vocabulary inside a text."""
    for step in steps:
        if step["type"] == "ByteLevel" and _BYTE_OF.keys() >= set(piece):
            return bytes([_BYTE_OF[character] for character in piece])
        if step["type"] == "Replace":
            piece = piece.replace(step["pattern"]["String"], step["content"])
        elif step["type"] == "Metaspace":
            piece = piece.replace(step["replacement"], " ")
        elif step["type"] == "WordPiece":
            prefix = step["prefix"]
            piece = piece.removeprefix(prefix) if piece.startswith(prefix) else f" {piece}"
    return piece.encode()


def vocabulary_map(teacher: TokenBytes, student: TokenBytes) -> np.ndarray:
    r"""
    The student's token for each of the teacher's: the one with the same bytes. A special token becomes the one of the
    same content; a token that ends a text becomes one that does, the student's first if none has the same content.

    Args:
        teacher ([`TokenBytes`]):
            Tokens to map, `V_t` of them.
        student ([`TokenBytes`]):
            Tokens to map to.

    Returns:
        `np.ndarray` of shape `(V_t,)`, int64: ids of the student; -1 where it has no such token.

    Examples:

    ```python
    >>> mistral, gpt2 = (TokenBytes(AutoTokenizer.from_pretrained(name)) for name in ("mistral", "gpt2"))
    >>> vocabulary_map(mistral, gpt2)[[736, 13, 2]]  # "▁there", "<0x0A>" and "</s>"
    array([  612,   198, 50256])
    ```
    """
    mapped = np.array([student.ids.get(piece, -1) for piece in teacher.table])
    ends = np.flatnonzero(teacher.kinds == 1)
    mapped[ends] = student.eos_token_ids[0] if student.eos_token_ids else -1
    for content, i in teacher.special.items():
        j = student.special.get(content, -1)
        if j >= 0 and student.kinds[j] == teacher.kinds[i]:
            mapped[i] = j
    return mapped


@dataclass(frozen=True)
class _Text:
    """Tokens as one run of bytes. The `solid` bytes are those that aren't white space; a rank counts them."""

    pieces: list[bytes]
    kinds: np.ndarray
    starts: np.ndarray  # of each token, in bytes
    ends: np.ndarray
    text: bytes
    solid: np.ndarray  # offsets of the solid bytes
    first: np.ndarray  # of each token, solid bytes before its start
    last: np.ndarray  # and before its end

    @classmethod
    def read(cls, tokens: TokenBytes, ids: Sequence[int], is_first: bool) -> "_Text":
        ids = np.asarray(ids, dtype=np.int64)
        ids = np.where((ids >= 0) & (ids < len(tokens.table)), ids, -1)
        pieces = [tokens.table[i] if i >= 0 else b"" for i in ids.tolist()]
        lengths = np.where(ids >= 0, tokens.lengths[ids], 0)
        for i in np.flatnonzero(lengths)[:1].tolist() if is_first and tokens.adds_space else ():
            pieces[i] = pieces[i].removeprefix(b" ")
            lengths[i] = len(pieces[i])
        ends, text = np.cumsum(lengths), b"".join(pieces)
        starts = ends - lengths
        is_solid = _IS_SOLID[np.frombuffer(text, np.uint8)]
        ranks = np.concatenate([[0], np.cumsum(is_solid)])
        kinds = np.where(ids >= 0, tokens.kinds[ids], -1)
        return cls(pieces, kinds, starts, ends, text, np.flatnonzero(is_solid), ranks[starts], ranks[ends])

    def hollow(self, gaps: np.ndarray) -> dict[tuple, int]:
        """
        The tokens without a solid byte, by what they are and where: in which of the `gaps` between solid bytes (-1 =
        nowhere), how much white space after the byte before it (in the first gap, before the byte after it).
        """
        total, edge = len(self.solid), self.solid[0] if len(self.solid) else len(self.text)
        behind = np.flatnonzero((self.kinds == 1) & (self.first == total))
        closed = behind[0] if len(behind) else len(self.pieces)
        counts, found = defaultdict(count), {}
        for i in np.flatnonzero((self.first == self.last) & ((self.ends > self.starts) | (self.kinds > 0))).tolist():
            rank, start, end, kind = self.first[i], self.starts[i], self.ends[i], int(self.kinds[i])
            if rank == total and kind == 1:
                place = ("end",)
            elif gaps[rank] < 0:
                continue
            elif rank == 0:
                place = (0, self.text[end:edge], i > closed)
            else:
                place = (int(gaps[rank]), self.text[self.solid[rank - 1] + 1 : start], i > closed)
            key = (*place, self.pieces[i], kind)
            found[*key, next(counts[key])] = i
        return found


def _common_ends(a: bytes, b: bytes) -> tuple[int, int]:
    """Lengths of the common prefix and, of what is left, the common suffix."""
    n = min(len(a), len(b))
    a, b = np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8)
    different = np.flatnonzero(a[:n] != b[:n])
    head = int(different[0]) if len(different) else n
    different = np.flatnonzero(a[len(a) - n + head :] != b[len(b) - n + head :])
    return head, n - head - 1 - int(different[-1]) if len(different) else n - head


def _match(student: _Text, teacher: _Text) -> np.ndarray:
    """For each solid byte of the student's text, which one of the teacher's it is, or -1."""
    a, b = (side.text.translate(None, WHITE_SPACE) for side in (student, teacher))
    matched = np.full(len(a), -1)

    def fill_ends(i0: int, i1: int, j0: int, j1: int) -> tuple[int, int]:
        head, tail = _common_ends(a[i0:i1], b[j0:j1])
        matched[i0 : i0 + head] = np.arange(j0, j0 + head)
        matched[i1 - tail : i1] = np.arange(j1 - tail, j1)
        return head, tail

    head, tail = fill_ends(0, len(a), 0, len(b))
    if head + tail == min(len(a), len(b)):
        return matched
    words = [
        _WORD.findall(side.text[side.solid[head] : side.solid[len(side.solid) - tail - 1] + 1])
        for side in (student, teacher)
    ]
    ranks = [head + np.cumsum([0, *map(len, side)]) for side in words]
    counts = [Counter(side) for side in words]
    is_repetitive = sum(n * counts[1][word] for word, n in counts[0].items()) > _MAX_EQUAL_WORDS
    for tag, i0, i1, j0, j1 in SequenceMatcher(None, *words, autojunk=is_repetitive).get_opcodes():
        # As many words as before: each one is another form of the one it replaces
        is_each = tag == "replace" and i1 - i0 == j1 - j0
        for i, j in zip(range(i0, i1), range(j0, j1), strict=True) if is_each else [(i0, j0)]:
            i_end, j_end = (i + 1, j + 1) if is_each else (i1, j1)
            fill_ends(ranks[0][i], ranks[0][i_end], ranks[1][j], ranks[1][j_end])
    return matched


def _solid_pairs(student: _Text, teacher: _Text, matched: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens whose solid bytes are the same ones."""
    i, j = (np.flatnonzero(side.last > side.first) for side in (student, teacher))
    if not len(j):
        return i[:0], j
    start, end = matched[student.first[i]], matched[student.last[i] - 1]
    width = len(teacher.solid)
    places = np.where((start >= 0) & (end >= 0), start * width + end, -1)
    teacher_places = teacher.first[j] * width + teacher.last[j] - 1
    k = np.searchsorted(teacher_places, places).clip(max=len(j) - 1)
    is_same_place = teacher_places[k] == places
    return i[is_same_place], j[k[is_same_place]]


def _context_pairs(student: _Text, teacher: _Text, gaps: np.ndarray) -> np.ndarray:
    """
    Tokens before which the same text stands: after the same solid byte and the same white space behind it. At the
    start of a text, which templates begin differently, before the same white space in front of the first solid byte.
    """
    found = []
    for side, places in ((student, gaps), (teacher, np.arange(len(teacher.solid) + 1))):
        is_end = side.kinds == 1
        behind = np.flatnonzero(is_end & (side.first == len(side.solid)))
        i = np.flatnonzero((side.ends > side.starts) | is_end)
        i = i[i <= behind[0]] if len(behind) else i  # what follows the end of the text is no part of it
        rank, edge = side.first[i], side.solid[0] if len(side.solid) else len(side.text)
        before = np.concatenate([[0], side.solid + 1])[rank]
        spaces = np.stack([np.where(rank == 0, side.starts[i], before), np.where(rank == 0, edge, side.starts[i])])
        # An end meets an end only: in the same text, nobody else is there
        codes = (places[rank] * (len(student.text) + len(teacher.text) + 1) + spaces[1] - spaces[0]) * 2 + is_end[i]
        known = places[rank] >= 0
        found.append((i[known], codes[known], spaces.T[known]))
    (i, codes, spaces), (j, teacher_codes, teacher_spaces) = found
    _, m, n = np.intersect1d(codes, teacher_codes, return_indices=True)
    is_same = [
        student.text[a:b] == teacher.text[c:d]
        for (a, b), (c, d) in zip(spaces[m].tolist(), teacher_spaces[n].tolist(), strict=True)
    ]
    pairs = np.stack([i[m], j[n]], axis=1)[np.array(is_same, dtype=bool)]
    return pairs[np.argsort(pairs[:, 0])]


def align(
    student: TokenBytes,
    teacher: TokenBytes,
    student_ids: Sequence[int],
    teacher_ids: Sequence[int],
    *,
    student_first: bool = False,
    teacher_first: bool = False,
    by: str = "token",
) -> np.ndarray:
    r"""
    Pairs of tokens with the same bytes at the same place of the same text: exact token alignment (ETA), as in
    [DSKDv2](https://huggingface.co/papers/2504.11426), but on the bytes of the text.

    The texts may differ in white space. A token's place is that of its bytes that aren't white space; its white space
    is the same too, since its bytes are. A token of white space alone follows the same white space after the same
    byte; at the start of a text, it precedes the same white space. A special token pairs with one of the same content
    at such a place, and an end of text behind all text with another one behind all text.

    Texts that differ otherwise, because a tokenizer normalises, has an unknown token, or saw invalid UTF-8 replaced,
    are matched by their common ends, and what is between by its words, with [`difflib.SequenceMatcher`].

    Args:
        student ([`TokenBytes`]):
            The student's tokens.
        teacher ([`TokenBytes`]):
            The teacher's tokens.
        student_ids (`Sequence[int]`):
            Token ids of the student.
        teacher_ids (`Sequence[int]`):
            Token ids of the teacher, for the same text or the start of it.
        student_first (`bool`, *optional*, defaults to `False`):
            Whether the student's ids start a row, so that the space is taken off that its tokenizer puts there.
        teacher_first (`bool`, *optional*, defaults to `False`):
            The same for the teacher's.
        by (`str`, *optional*, defaults to `"token"`):
            `"token"` as above; `"context"` (ours) for all tokens before which the same text stands, whatever they are
            themselves: there, both models predict how that text goes on.

    Returns:
        `np.ndarray` of shape `(n, 2)`, int64: pairs of indices into both lists of ids, ascending on both sides.

    Note:
        The authors compare the strings of the vocabularies, which write line breaks and bytes above ASCII each in
        their own way; after the first such token nothing more is aligned (`songmzhang/DSKDv2` 5025279).

    Examples:

    ```python
    >>> align(gpt2, mistral, gpt2_tokenizer("Hi there")["input_ids"], mistral_tokenizer("Hi there")["input_ids"])
    array([[1, 2]])
    >>> align(gpt2, mistral, [17250, 612], [1, 15359, 736], teacher_first=True)
    array([[0, 1],
           [1, 2]])
    ```
    """
    a, b = _Text.read(student, student_ids, student_first), _Text.read(teacher, teacher_ids, teacher_first)
    matched = _match(a, b)
    # A gap is where the byte before it is; the first one is where the byte after it is, which must be the first too
    is_same_start = matched[0] == 0 if len(matched) else not len(b.solid)
    gaps = np.concatenate([[0 if is_same_start else -1], np.where(matched >= 0, matched + 1, -1)])
    if by == "context":
        return _context_pairs(a, b, gaps)
    i, j = _solid_pairs(a, b, matched)
    is_same = np.array([a.pieces[m] == b.pieces[n] for m, n in zip(i.tolist(), j.tolist(), strict=True)], dtype=bool)
    hollow = a.hollow(gaps)
    other = b.hollow(np.arange(len(b.solid) + 1)) if hollow else {}
    hollow = [(m, other[key]) for key, m in hollow.items() if key in other]
    pairs = np.concatenate([np.stack([i, j], axis=1)[is_same], np.array(hollow, dtype=np.int64).reshape(-1, 2)])
    pairs = pairs[np.argsort(pairs[:, 0])]
    # Special tokens may stand in another order
    highest = np.maximum.accumulate(np.concatenate([[-1], pairs[:, 1]]))[:-1]
    return pairs[pairs[:, 1] > highest]


def align_row(
    student: TokenBytes,
    teacher: TokenBytes,
    student_labels: Sequence[int],
    teacher_labels: Sequence[int],
    by: str = "token",
) -> np.ndarray:
    r"""
    The partners of a row's trained tokens. The first trained stretch of the student's row is aligned with the first of
    the teacher's, the second with the second, and so on: what lies between, each model's chat template writes its own
    way.

    Args:
        student ([`TokenBytes`]):
            The student's tokens.
        teacher ([`TokenBytes`]):
            The teacher's tokens.
        student_labels (`Sequence[int]` of length `S`):
            Token ids of a row of the student, -100 where it isn't trained.
        teacher_labels (`Sequence[int]` of length `T`):
            The same for the teacher.
        by (`str`, *optional*, defaults to `"token"`):
            As in [`align`].

    Returns:
        `np.ndarray` of shape `(S,)`, int64: the position of each token's partner in the teacher's row, or -1. The
        first position of a row has none, nor is it one, since nothing predicts it.

    Examples:

    ```python
    >>> align_row(gpt2, mistral, [-100, 612, 50256], [-100, -100, 736, 2])
    array([-1,  2,  3])
    ```
    """
    student_labels, teacher_labels = np.asarray(student_labels), np.asarray(teacher_labels)
    partners = np.full(len(student_labels), -1)
    for (i0, i1), (j0, j1) in zip(stretches(student_labels), stretches(teacher_labels), strict=False):
        ids, teacher_ids = student_labels[i0:i1], teacher_labels[j0:j1]
        pairs = align(student, teacher, ids, teacher_ids, student_first=i0 == 0, teacher_first=j0 == 0, by=by)
        pairs = pairs + [i0, j0]
        pairs = pairs[(pairs > 0).all(axis=1)]
        partners[pairs[:, 0]] = pairs[:, 1]
    return partners


def stretches(labels: np.ndarray) -> np.ndarray:
    """Where each run of trained labels starts and ends."""
    is_trained = np.concatenate([[False], labels != -100, [False]])
    return np.flatnonzero(is_trained[1:] != is_trained[:-1]).reshape(-1, 2)
