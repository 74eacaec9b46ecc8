import doctest
import json
import random
import re
import time
from functools import cache
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from tests.tiny import END_OF_TEXT, IM_END, IM_START, SEED_TEXT, make_tokenizer
from trl_kd.data import TokenBytes, align, align_row, prepare_dataset, vocabulary_map


SHARED = Path(__file__).parents[2].parent / "shared" / "data"

OTHER_SEED_TEXT = (
    "The cat sat there. Natalia sold 48 clips; how much did the others say? Nothing:\n\nnot even half. Cats."
)

# What tokenizers disagree about: white space, characters of several bytes, combining marks, what NFKC changes, digits.
FRAGMENTS = [
    *("the", " fox", " river", "Hello", ' "Why', "don't", ".", ", ", "!?", " 1234", "#### 72", "x = [1, 2]"),
    *(" ", "  ", "\n", "\n\n", "\t", "\r\n", "   \n ", "\N{NO-BREAK SPACE}", "\N{IDEOGRAPHIC SPACE}", "\v"),
    *("é", "e\N{COMBINING ACUTE ACCENT}", " naïve", "ﬁ", "①", "ΑΒγ", "ру́сский", "हिन्दी", "你好", "世界。", "א"),
    *("😀", "👩\N{ZERO WIDTH JOINER}👧", "🇩🇪", "\N{REPLACEMENT CHARACTER}", "▁", "Ġ", "<0x41>", "##ing", "\x01"),
]


def random_text(rng):
    return "".join(rng.choices(FRAGMENTS, k=rng.choice([0, 1, 2, 5, 20, 40])))


def wrap(tokenizer, **special_tokens):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens)


def sentencepiece_like(decoder, prepend_scheme="first", seed_text=SEED_TEXT):
    """BPE over "▁" with byte fallback; the trainer would make special tokens of the bytes."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    trained.train_from_iterator([seed_text], trainers.BpeTrainer(vocab_size=200, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    model["vocab"] = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(
        models.BPE(model["vocab"], merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True),
    )
    tokenizer.pre_tokenizer, tokenizer.decoder = trained.pre_tokenizer, decoder
    return wrap(tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def replacing_decoder():
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return decoders.Sequence(steps)


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.normalizer = normalizers.NFKC()
    special_tokens = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=special_tokens, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([SEED_TEXT, OTHER_SEED_TEXT], trainer)
    return wrap(tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="<pad>")


def wordpiece(lowercase=False):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator([SEED_TEXT + OTHER_SEED_TEXT + "é世界。你好()[]=#1234567890"], trainer)
    return wrap(tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", eos_token="[SEP]")


MAKERS = {
    "bytes": make_tokenizer,
    "other_bytes": lambda: make_tokenizer(OTHER_SEED_TEXT, 320),
    "sentencepiece": lambda: sentencepiece_like(replacing_decoder()),
    "metaspace": lambda: sentencepiece_like(
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")]),
        "never",
        OTHER_SEED_TEXT,
    ),
    "unigram": unigram,
    "wordpiece": wordpiece,
    "lowercase": lambda: wordpiece(lowercase=True),
}
# They write every text without changing it
FAITHFUL = ["bytes", "other_bytes", "sentencepiece", "metaspace"]


@cache
def side(name):
    """Tokenizer and its table."""
    tokenizer = MAKERS[name]()
    return tokenizer, TokenBytes(tokenizer)


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@cache
def visible_bytes():
    """How a byte-level vocabulary writes each byte that occurs in valid UTF-8, as the library has it."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    visible = {}
    for code in [*range(0x800), *range(0x800, 0x11000, 63), *range(0x11000, 0x110000, 4095)]:
        if not 0xD800 <= code < 0xE000:
            [(written, _)] = byte_level.pre_tokenize_str(chr(code))
            visible |= zip(chr(code).encode(), written, strict=True)
    assert len(visible) == 256 - 13
    return visible


def literal(pieces, eos=("</s>",)):
    """
    Table of a byte-level tokenizer with these pieces, text or bytes, and the ids that write them. Those that start
    with "<" are special tokens, behind the others.
    """
    special = list(dict.fromkeys(piece for piece in pieces if piece[:1] == "<"))
    texts = dict.fromkeys(piece.encode() if isinstance(piece, str) else piece for piece in pieces)
    texts = [text for text in texts if text.decode(errors="replace") not in special]
    tokenizer = Tokenizer(
        models.BPE({"".join(visible_bytes()[byte] for byte in text): i for i, text in enumerate(texts)}, [])
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokens = TokenBytes(wrap(tokenizer), [tokenizer.token_to_id(token) for token in eos if token in special])
    ids = {text: i for i, text in enumerate([*texts, *(token.encode() for token in special)])}
    return tokens, [ids[piece.encode() if isinstance(piece, str) else piece] for piece in pieces]


def pairs_of(student, teacher, eos=("</s>",), **options):
    """Pairs of two texts, each given as the pieces it is written with."""
    (student, student_ids), (teacher, teacher_ids) = literal(student, eos), literal(teacher, eos)
    return align(student, teacher, student_ids, teacher_ids, **options).tolist()


def is_space(byte):
    return byte in b" \t\n\r\x0b\x0c"


def byte_places(text, solid_names):
    """A name for the place of each byte, and of each boundary between two."""
    places, boundaries = [], []
    first = next((i for i, byte in enumerate(text) if not is_space(byte)), len(text))
    names, previous, behind = iter(solid_names), None, b""
    for i in range(len(text) + 1):
        lead = text[i:first]
        boundaries.append(("before", bytes(lead)) if previous is None else (previous, behind))
        if i == len(text):
            break
        byte = text[i]
        if not is_space(byte):
            previous, behind = next(names), b""
            places.append(previous)
        elif previous is None:
            places.append(("before", bytes(lead)))
        else:
            behind += bytes([byte])
            places.append((previous, behind))
    return places, boundaries


def name_solid(a, b):
    """Names of solid bytes: equal for equal ones of the common start and end, unequal for what is between."""
    a, b = ([byte for byte in text if not is_space(byte)] for text in (a, b))
    head = 0
    while head < min(len(a), len(b)) and a[head] == b[head]:
        head += 1
    tail = 0
    while tail < min(len(a), len(b)) - head and a[-1 - tail] == b[-1 - tail]:
        tail += 1

    def names(side, own):
        for i in range(len(side)):
            if i < head:
                yield f"head {i}"
            elif i >= len(side) - tail:
                yield f"tail {len(side) - i}"
            else:
                yield f"{own} {i}"

    return list(names(a, "student")), list(names(b, "teacher")), a == b


def reference(student, teacher, student_ids, teacher_ids, student_first=False, teacher_first=False):
    """Pairs by a loop over bytes, all of them if the texts differ in white space alone, and whether this is so."""
    sides = []
    for tokens, ids, is_first in ((student, student_ids, student_first), (teacher, teacher_ids, teacher_first)):
        pieces = [tokens.table[i] for i in ids]
        for i, piece in enumerate(pieces):
            if piece:
                pieces[i] = piece[1:] if is_first and tokens.adds_space and piece[:1] == b" " else piece
                break
        sides.append(pieces)
    *names, is_same = name_solid(*(b"".join(pieces) for pieces in sides))
    if names[0] and names[1]:
        # White space before the text counts only if it stands before the same byte
        is_same_start = names[0][0] == names[1][0]
    else:
        is_same_start = not names[0] and not names[1]
    keys = []
    for tokens, ids, pieces, own, solid in zip(
        (student, teacher), (student_ids, teacher_ids), sides, ("student", "teacher"), names, strict=True
    ):
        keys.append(token_keys(tokens, ids, pieces, solid, own if not is_same_start else "both"))
    found = []
    for i, key in enumerate(keys[0]):
        if key is not None and key in keys[1] and (not found or keys[1].index(key) > found[-1][1]):
            found.append([i, keys[1].index(key)])
    return found, is_same


def token_keys(tokens, ids, pieces, names, start_name):
    text = b"".join(pieces)
    places, boundaries = byte_places(text, names)
    offset, num_solid, num_seen, is_closed, seen, keys = 0, len(names), 0, False, {}, []
    for i, piece in zip(ids, pieces, strict=True):
        kind = int(tokens.kinds[i])
        own = places[offset : offset + len(piece)]
        solid = [place for place, byte in zip(own, piece, strict=True) if not is_space(byte)]
        key = None
        if solid:
            key = ("text", piece, solid[0], solid[-1])
        elif kind == 1 and num_seen == num_solid:
            key = ("end",)
        elif piece or kind > 0:
            # Left of it, or for what precedes all text: right of it
            boundary = boundaries[offset + len(piece)] if num_seen == 0 else boundaries[offset]
            key = ("other", piece, kind, boundary, is_closed, start_name if num_seen == 0 else "both")
        if key is not None:
            seen[key] = seen.get(key, 0) + 1
            keys.append((*key, seen[key]))
        else:
            keys.append(None)
        is_closed |= kind == 1 and num_seen == num_solid
        num_seen += len(solid)
        offset += len(piece)
    return keys


def check(student, teacher, student_ids, teacher_ids, **options):
    """Pairs, after they have been held against everything that must be true of them."""
    pairs = align(student, teacher, student_ids, teacher_ids, **options)
    assert pairs.dtype == np.int64 and pairs.shape == (len(pairs), 2)
    assert all(a < c and b < d for (a, b), (c, d) in pairwise(pairs.tolist()))
    first = {"student": options.get("student_first"), "teacher": options.get("teacher_first")}
    for i, j in pairs.tolist():
        a, b = student.table[student_ids[i]], teacher.table[teacher_ids[j]]
        may_differ = any(first.values()) and a.removeprefix(b" ") == b.removeprefix(b" ")
        assert a == b or may_differ
        assert a or student.kinds[student_ids[i]] == teacher.kinds[teacher_ids[j]] >= 1
    expected, is_same = reference(student, teacher, student_ids, teacher_ids, **options)
    if is_same:
        assert pairs.tolist() == expected
    else:
        assert set(map(tuple, expected)) <= set(map(tuple, pairs.tolist()))
    return pairs


def bytes_of(tokens, tokenizer, *names):
    return [tokens.table[tokenizer.convert_tokens_to_ids(name)] for name in names]


def test_token_bytes_byte_level_reads_the_alphabet_of_gpt2():
    tokenizer, tokens = side("bytes")
    names = ("a", "Ġ", "Ċ", "ĉ", "Ã", "©", "Ġthe", "Ń", "ÿ", "Ā", "¡")
    expected = [b"a", b" ", b"\n", b"\t", b"\xc3", b"\xa9", b" the", b"\xad", b"\xff", b"\x00", b"\xa1"]
    assert bytes_of(tokens, tokenizer, *names) == expected
    assert sorted(piece for piece in tokens.table if len(piece) == 1) == [bytes([byte]) for byte in range(256)]
    assert not tokens.adds_space


@pytest.mark.parametrize(("name", "adds_space"), [("sentencepiece", True), ("metaspace", False)])
def test_token_bytes_sentencepiece_reads_marks_and_bytes(name, adds_space):
    tokenizer, tokens = side(name)
    names = ("▁", "▁the", "<0x0A>", "<0xE4>", "<0x41>", "e")
    assert bytes_of(tokens, tokenizer, *names) == [b" ", b" the", b"\n", b"\xe4", b"A", b"e"]
    assert tokens.adds_space is adds_space


def test_token_bytes_byte_tokens_are_literal_unless_model_or_decoder_fall_back():
    def table(byte_fallback, decoder):
        tokenizer = Tokenizer(models.BPE({"<0x0A>": 0, "▁a": 1, "<0x0A>a": 2}, [], byte_fallback=byte_fallback))
        tokenizer.decoder = decoder
        return TokenBytes(wrap(tokenizer)).table

    with_fallback = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    assert table(False, decoders.Metaspace()) == [b"<0x0A>", b" a", b"<0x0A>a"]
    assert table(True, decoders.Metaspace()) == [b"\n", b" a", b"<0x0A>a"]
    assert table(False, with_fallback) == [b"\n", b" a", b"<0x0A>a"]


def test_token_bytes_unigram_has_no_bytes_for_the_unknown_token():
    tokenizer, tokens = side("unigram")
    unknown = tokenizer.unk_token_id
    assert bytes_of(tokens, tokenizer, "▁the", "s") == [b" the", b"s"]
    assert (tokens.table[unknown], tokens.kinds[unknown], tokens.adds_space) == (b"", -1, True)


def test_token_bytes_wordpiece_puts_a_space_before_what_starts_a_word():
    tokenizer, tokens = side("wordpiece")
    unknown = tokenizer.unk_token_id
    assert bytes_of(tokens, tokenizer, "the", "##r", "é", ".") == [b" the", b"r", " é".encode(), b" ."]
    assert (tokens.table[unknown], tokens.kinds[unknown], tokens.adds_space) == (b"", -1, True)


@pytest.mark.parametrize("name", ["bytes", "other_bytes", "sentencepiece", "metaspace", "unigram"])
def test_token_bytes_decode_is_what_the_tokenizer_decodes(name):
    tokenizer, tokens = side(name)
    rng = random.Random(1)
    for _ in range(30):
        text = random_text(rng) if name in FAITHFUL else "".join(rng.choices(["the", " fox", " ", ".", "cold"], k=9))
        # "▁" is a space when it is read again
        text = "a" + text.replace("▁", "")
        ids = encode(tokenizer, text)
        assert tokens.decode(ids) == " " * tokens.adds_space + tokenizer.decode(ids)
        if name in FAITHFUL:
            assert tokens.text(ids) == b" " * tokens.adds_space + text.encode()
        assert sum(tokens.lengths[ids]) == len(tokens.text(ids))


def test_token_bytes_text_invalid_utf8_stays_and_decode_replaces_it():
    tokenizer, tokens = side("bytes")
    ids = [
        *encode(tokenizer, "a"),
        tokenizer.convert_tokens_to_ids("Ã"),
        len(tokens.table),
        -100,
        *encode(tokenizer, "b"),
    ]
    assert tokens.text(ids) == b"a\xc3b"
    assert tokens.decode(ids) == "a\N{REPLACEMENT CHARACTER}b"


def test_token_bytes_kinds_are_equal_for_equal_content_in_every_tokenizer():
    (student, tokens), (teacher, teacher_tokens) = side("bytes"), side("other_bytes")
    kinds = {name: int(tokens.kinds[student.convert_tokens_to_ids(name)]) for name in (END_OF_TEXT, IM_START, IM_END)}
    assert kinds[IM_END] == 1
    assert kinds[IM_START] >= 2 and kinds[END_OF_TEXT] >= 2 and kinds[IM_START] != kinds[END_OF_TEXT]
    for name, kind in kinds.items():
        assert teacher_tokens.kinds[teacher.convert_tokens_to_ids(name)] == kind
    # A constant: kinds of two processes must agree
    assert literal(["<s>"])[0].kinds[0] == 42636412803819342
    ordinary = np.setdiff1d(np.arange(len(student)), list(tokens.special.values()))
    assert (tokens.kinds[ordinary] == 0).all() and (tokens.lengths[ordinary] > 0).all()
    assert (tokens.lengths[list(tokens.special.values())] == 0).all()


def test_token_bytes_eos_token_ids_come_before_the_tokenizers_own():
    tokenizer = make_tokenizer()
    end_of_text, im_end = tokenizer.convert_tokens_to_ids([END_OF_TEXT, IM_END])
    assert TokenBytes(tokenizer).eos_token_ids == (im_end,)
    tokens = TokenBytes(tokenizer, iter([end_of_text, im_end, end_of_text]))
    assert tokens.eos_token_ids == (end_of_text, im_end)
    assert tokens.kinds[[end_of_text, im_end]].tolist() == [1, 1]
    tokenizer.eos_token = None
    assert TokenBytes(tokenizer).eos_token_ids == ()


def test_token_bytes_unknown_token_that_ends_a_text_is_an_end():
    tokenizer = sentencepiece_like(replacing_decoder())
    tokenizer.eos_token = "<unk>"
    tokens = TokenBytes(tokenizer)
    assert tokens.kinds[:3].tolist()[0] == 1 and (tokens.kinds[1:3] >= 2).all()


def test_token_bytes_ids_without_token_are_unknown():
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 3}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokens = TokenBytes(wrap(tokenizer), [5])
    assert tokens.table == [b"a", b"", b"", b"b", b"", b""]
    assert tokens.kinds.tolist() == [0, -1, -1, 0, -1, 1]
    assert tokens.lengths.tolist() == [1, 0, 0, 1, 0, 0]


def test_token_bytes_added_token_that_is_not_special_stands_for_its_content():
    for name in ("bytes", "sentencepiece", "wordpiece"):
        tokenizer = MAKERS[name]()
        tokenizer.add_tokens(["<think>", "é", "▁▁", "  ", "Ġx"])
        tokens = TokenBytes(tokenizer)
        added = [AddedToken("<think>").content, "é", "▁▁", "  ", "Ġx"]
        new = [token for token in added if token not in side(name)[0].get_vocab()]
        assert len(new) >= 4
        assert bytes_of(tokens, tokenizer, *new) == [token.encode() for token in new]
        assert (tokens.kinds[tokenizer.convert_tokens_to_ids(new)] == 0).all()


def test_token_bytes_added_token_that_the_model_has_too_is_written_as_the_model_writes_it():
    tokenizer = Tokenizer(models.BPE({"▁": 0, "▁▁": 1, "a": 2}, [("▁", "▁")]))
    tokenizer.normalizer, tokenizer.decoder = normalizers.Replace(" ", "▁"), decoders.Replace("▁", " ")
    tokenizer.add_tokens([AddedToken("▁▁", normalized=False)])
    tokens = TokenBytes(wrap(tokenizer))
    assert tokens.table == [b" ", b"  ", b"a"] and not tokens.adds_space
    assert tokens.text(encode(wrap(tokenizer), "  a")) == b"  a"


@pytest.mark.parametrize(
    ("part", "step", "adds_space"),
    [
        ("normalizer", normalizers.Sequence([normalizers.NFC(), normalizers.Prepend("▁")]), True),
        ("pre_tokenizer", pre_tokenizers.Metaspace(prepend_scheme="always"), True),
        ("pre_tokenizer", pre_tokenizers.Metaspace(prepend_scheme="first"), True),
        ("pre_tokenizer", pre_tokenizers.Metaspace(prepend_scheme="never"), False),
        ("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True), True),
        ("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False), False),
        (
            "pre_tokenizer",
            pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]),
            True,
        ),
    ],
)
def test_token_bytes_adds_space_if_a_step_before_the_model_does(part, step, adds_space):
    tokenizer = Tokenizer(models.BPE({"a": 0, "▁": 1, "Ġ": 2, "▁a": 3, "Ġa": 4}, [("▁", "a"), ("Ġ", "a")]))
    # What this decoder puts before a text that it writes is no matter
    tokenizer.decoder = decoders.ByteLevel() if "ByteLevel" in repr(step) else decoders.Metaspace()
    setattr(tokenizer, part, step)
    tokens = TokenBytes(wrap(tokenizer))
    assert tokens.adds_space is adds_space
    assert tokens.text(encode(wrap(tokenizer), "a")) == (b" a" if adds_space else b"a")


def test_token_bytes_slow_tokenizer_is_refused():
    expected = (
        "The tokenizer is a `ByT5Tokenizer`, which isn't fast: it doesn't say which bytes its tokens stand for, so "
        "they can't be aligned with another tokenizer's. Load it with `use_fast=True`, or convert it to a "
        "`tokenizer.json`."
    )
    with pytest.raises(ValueError) as error:
        TokenBytes(ByT5Tokenizer())
    assert str(error.value) == expected


@pytest.mark.parametrize(
    ("decoder", "found"),
    [
        (None, "no steps"),
        (decoders.CTC(), "the step {.*CTC.*}"),
        (decoders.BPEDecoder(), "the step {.*BPEDecoder.*}"),
        (decoders.Replace(Regex("▁+"), " "), "the step {.*Regex.*}"),
        (decoders.Strip(" ", 1, 0), "the step {.*Strip.*}"),
        (decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 1)]), "the step {.*Strip.*}"),
        (decoders.Sequence([decoders.Strip(" ", 1, 0), decoders.Fuse()]), "the step {.*Strip.*}"),
        (decoders.Sequence([decoders.ByteLevel(), decoders.Sequence([decoders.CTC()])]), "the step {.*CTC.*}"),
        (decoders.Sequence([decoders.CTC(), decoders.ByteLevel()]), "the step {.*CTC.*}"),
        (decoders.Sequence([decoders.Fuse(), decoders.CTC()]), "the step {.*CTC.*}"),
        (decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)]), "the step {.*Strip.*}"),
    ],
)
def test_token_bytes_unknown_decoder_is_refused(decoder, found):
    tokenizer = Tokenizer(models.BPE({"a": 0}, []))
    if decoder is not None:
        tokenizer.decoder = decoder
    expected = (
        f"^The decoder of the tokenizer has {found}, which doesn't tell which bytes its tokens stand for, so they "
        "can't be aligned with another tokenizer's. Use a tokenizer whose decoder is byte-level, Metaspace, "
        "WordPiece, or replaces and strips literal text, or a teacher with the student's vocabulary.$"
    )
    with pytest.raises(ValueError, match=expected):
        TokenBytes(wrap(tokenizer))


def test_token_bytes_space_stripped_from_the_whole_text_is_in_the_table():
    tokenizer = wrap(Tokenizer(models.BPE({" a": 0}, [])))
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    assert TokenBytes(tokenizer).table == [b" a"]


def test_vocabulary_map_same_bytes_wherever_they_are():
    teacher, _ = literal(["a", " b", "é", b"\xc3", "only", "<s>", "<pad>", "</s>"])
    student, _ = literal(["é", "<pad>", "zz", "</s>", " b", b"\xc3", "a", "<bos>"])
    # Ids: texts in order, then the special tokens in order
    assert vocabulary_map(teacher, student).tolist() == [4, 2, 0, 3, -1, -1, 5, 6]


def test_vocabulary_map_ends_become_the_same_end_or_the_first():
    teacher, _ = literal(["a", "</s>", "<eot>", "<end>"], eos=("</s>", "<eot>"))
    student, _ = literal(["<x>", "<eot>", "a", "<end>"], eos=("<end>", "<eot>"))
    # "</s>" has no other of its content; "<end>" is no end of the teacher's
    assert vocabulary_map(teacher, student).tolist() == [0, 3, 2, -1]
    student, _ = literal(["a", "<x>", "<y>"], eos=("<y>", "<x>"))
    assert vocabulary_map(teacher, student).tolist() == [0, 2, 2, -1]
    student, _ = literal(["a", "<x>"])
    assert vocabulary_map(teacher, student).tolist() == [0, -1, -1, -1]


def test_vocabulary_map_byte_token_only_if_no_other_has_the_byte():
    (sentencepiece, tokens), (byte_level, byte_tokens) = side("sentencepiece"), side("bytes")
    mapped = vocabulary_map(byte_tokens, tokens)
    names = ("e", "ĉ", "Ġ", "Ã")
    expected = ("e", "<0x09>", "▁", "<0xC3>")
    ids, expected = byte_level.convert_tokens_to_ids(names), sentencepiece.convert_tokens_to_ids(expected)
    assert mapped[ids].tolist() == list(expected)
    back = vocabulary_map(tokens, byte_tokens)
    assert (back[sentencepiece.convert_tokens_to_ids(["<0x65>", "e"])] == byte_level.convert_tokens_to_ids("e")).all()


def test_vocabulary_map_lowest_of_several_ids():
    tokenizer = Tokenizer(models.BPE({"▁": 2, " ": 1, "a": 0}, []))
    tokenizer.decoder = decoders.Metaspace()
    tokens = TokenBytes(wrap(tokenizer))
    assert vocabulary_map(tokens, tokens).tolist() == [0, 1, 1]


@pytest.mark.parametrize("name", MAKERS)
def test_vocabulary_map_onto_itself_keeps_all_but_unknown_and_repeated(name):
    tokens = side(name)[1]
    mapped = vocabulary_map(tokens, tokens)
    for i, (piece, kind) in enumerate(zip(tokens.table, tokens.kinds.tolist(), strict=True)):
        if kind < 0 or (kind == 0 and not piece):
            assert mapped[i] == -1
        elif kind > 0 or tokens.table.count(piece) == 1:
            assert mapped[i] == i
        else:
            assert tokens.table[mapped[i]] == piece and tokens.kinds[mapped[i]] == 0


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        # Splits
        (["Hi", " there"], ["Hi", " there"], [[0, 0], [1, 1]]),
        (["Hi", " there", "!"], ["H", "i", " there", "!"], [[1, 2], [2, 3]]),
        (["ab", "cd"], ["a", "bc", "d"], []),
        (["a", "b", "cd"], ["ab", "c", "d"], []),
        (["a", "a", "a"], ["aa", "a"], [[2, 1]]),
        ([], ["a"], []),
        (["a"], [], []),
        ([], [], []),
        # Characters of several bytes, and what follows a line break
        (["x", b"\xf0\x9f", b"\x98\x80", "y"], ["x", "😀", "y"], [[0, 0], [3, 2]]),
        (["x", b"\xf0\x9f", b"\x98\x80"], ["x", b"\xf0", b"\x9f", b"\x98\x80"], [[0, 0], [2, 3]]),
        (["one", "\n", "tw", "o", "é"], ["one", "\n", "two", "é"], [[0, 0], [1, 1], [4, 3]]),
        (["a", " b"], ["a", " ", "b"], [[0, 0]]),
        (["a", "\n\n", "b"], ["a", "\n", "\n", "b"], [[0, 0], [2, 3]]),
        (["a", "\n", "\n", "b"], ["a", "\n", "\n", "b"], [[0, 0], [1, 1], [2, 2], [3, 3]]),
        # White space around the text
        ([" ", "a", " b"], ["a", " b"], [[1, 0], [2, 1]]),
        (["\n", " ", "a"], ["\t", " ", "a"], [[1, 1], [2, 2]]),
        (["\n", " ", "a"], [" ", "\n", "a"], [[2, 2]]),
        (["\n", "\n", "a"], ["\n", "a"], [[1, 0], [2, 1]]),
        (["a", "\n"], ["a"], [[0, 0]]),
        (["a", "\n"], ["a", "\n", "\n"], [[0, 0], [1, 1]]),
        (["a", " ", "\n"], ["a", "\n", " "], [[0, 0]]),
        (["a", "\n", " "], ["a", "\n\n", " "], [[0, 0]]),
        (["\n"], ["\n"], [[0, 0]]),
        (["\n", "\n"], ["\n"], [[1, 0]]),
        (["\n"], ["\n", "a"], []),
        # White space that a tokenizer collapses or lays elsewhere
        (["a", "  ", "b"], ["a", " ", "b"], [[0, 0], [2, 2]]),
        (["a", " ", " b"], ["a", " b"], [[0, 0], [2, 1]]),
        (["a", "\n", " b"], ["a", "\n", "b"], [[0, 0], [1, 1]]),
        (["a", "\n", "\n", "b"], ["a", "\n", "\t", "b"], [[0, 0], [1, 1], [3, 3]]),
        (["don", "'", "t"], [" don", " '", "t"], [[2, 2]]),
        (["b ", "c"], ["b", " c"], []),
        (["b c", " d"], ["b  c", " d"], [[1, 1]]),
    ],
)
def test_align_literal_texts_give_the_pairs_worked_out(student, teacher, expected):
    assert pairs_of(student, teacher) == expected
    assert pairs_of(teacher, student) == [[j, i] for i, j in expected]


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        # Ends
        (["a", "</s>"], ["a", "<end>"], [[0, 0], [1, 1]]),
        (["a", "</s>"], ["a", "\n", "<end>"], [[0, 0], [1, 2]]),
        (["a", "</s>"], ["a"], [[0, 0]]),
        (["a", "b", "</s>"], ["a", "b", "c", "<end>"], [[0, 0], [1, 1], [2, 3]]),
        (["a", "</s>", "<end>"], ["a", "<end>"], [[0, 0], [1, 1]]),
        (["a", "</s>", "</s>"], ["a", "</s>", "</s>"], [[0, 0], [1, 1], [2, 2]]),
        (["</s>"], ["<end>"], [[0, 0]]),
        (["\n", "</s>"], ["</s>"], [[1, 0]]),
        # An end inside the text pairs with one at the same place, not with the last one
        (["a", "</s>", "b"], ["a", "<end>", "b"], [[0, 0], [1, 1], [2, 2]]),
        (["a", "</s>", "b"], ["a", "b", "</s>"], [[0, 0], [2, 1]]),
        (["a", "\n", "</s>", "b"], ["a", "</s>", "\n", "b"], [[0, 0], [1, 2], [3, 3]]),
        # What follows the end is no part of the text
        (["a", "\n", "</s>"], ["a", "</s>", "\n"], [[0, 0], [2, 1]]),
        (["a", "</s>", "\n"], ["a", "</s>", "\n"], [[0, 0], [1, 1], [2, 2]]),
        # Other special tokens
        (["<s>", "a"], ["<s>", "a"], [[0, 0], [1, 1]]),
        (["<s>", "a"], ["<bos>", "a"], [[1, 1]]),
        (["<bos>", "<s>", "a"], ["<s>", "a"], [[1, 0], [2, 1]]),
        (["<s>", " ", "a"], ["<s>", "a"], [[2, 1]]),
        (["a", "<s>", " b"], ["a", "<s>", " b"], [[0, 0], [1, 1], [2, 2]]),
        (["a", "<s>", "b"], ["a", "\n", "<s>", "b"], [[0, 0], [2, 3]]),
        (["a", "<s>", "b"], ["ab", "<s>"], []),
        (["a", "<s>", "<s>", "b"], ["a", "<s>", "b"], [[0, 0], [1, 1], [3, 2]]),
        (["a", "<s>", "<t>", "b"], ["a", "<t>", "<s>", "b"], [[0, 0], [1, 2], [3, 3]]),
        (["a", "<s>", "<t>", "b"], ["a", "<t>", "<t>", "b"], [[0, 0], [2, 1], [3, 3]]),
        (["a", "<s>", "</s>"], ["a", "</s>", "<s>"], [[0, 0], [2, 1]]),
    ],
)
def test_align_literal_special_tokens_give_the_pairs_worked_out(student, teacher, expected):
    assert pairs_of(student, teacher, eos=("</s>", "<end>")) == expected


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        # One side is cut, in a word or in a character
        (["a", " b"], ["a", " b", " c"], [[0, 0], [1, 1]]),
        (["a", " b"], ["a", " bc"], [[0, 0]]),
        (["a", "\n"], ["a", "\n", "\n", "b"], [[0, 0], [1, 1]]),
        (["a", " ", "\n"], ["a", " ", "b"], [[0, 0], [1, 1]]),
        (["a", "é"], ["a", b"\xc3"], [[0, 0]]),
        # A word that only one side has, or writes in another way
        (["a", " X", " b", " c"], ["a", " Y", " b", " c"], [[0, 0], [2, 2], [3, 3]]),
        (["a", " b", " c"], ["a", " X", " b", " c"], [[0, 0], [1, 2], [2, 3]]),
        (["X", " b", " c"], [" b", " c"], [[1, 0], [2, 1]]),
        ([" ", "b", " c"], ["X", " ", "b", " c"], [[1, 2], [2, 3]]),
        ([" ", "a", "X"], [" ", "a", "Y"], [[0, 0], [1, 1]]),
        (
            ["X", "a", " b", "Y", "a", " c", "Z"],
            ["x", "a", " b", "y", "a", " c", "z"],
            [[1, 1], [2, 2], [4, 4], [5, 5]],
        ),
        # Between two differences: words in order, and the white space after them
        (["X", " b", "\n", "c", " Y"], ["x", " b", "\n", "c", " y"], [[1, 1], [2, 2], [3, 3]]),
        (["X", "\n", "b", " Y"], ["x", "\n", "b", " y"], [[2, 2]]),
        (["X", " b", " c", " Y"], ["x", " q", " b", " c", " y"], [[1, 2], [2, 3]]),
        ([" c", " d"], ["X", " c", " c", " d"], [[0, 2], [1, 3]]),
        # A changed word keeps its common ends, also beside others
        (
            ["X", " b", " P", "a", " Q", "a", " c", " Y"],
            ["x", " b", " p", "a", " q", "a", " c", " y"],
            [[1, 1], [3, 3], [5, 5], [6, 6]],
        ),
        (["X", " He", "llo", " Y"], ["x", " hE", "llo", " y"], [[2, 2]]),
        (["X", " ca", "f", "é", " Y"], ["x", " ca", "f", "e", b"\xcc\x81", " y"], [[1, 1], [2, 2]]),
        # Two words whose first is in the same place and whose second isn't
        (["X", " a b", " P", " b", " c", " d", " Y"], ["x", " a b", " c", " d", " y"], [[4, 2], [5, 3]]),
        # Special tokens and ends stay where they are
        (["X", " b", "<s>", " Y", "</s>"], ["x", " b", "<s>", " y", "</s>"], [[1, 1], [2, 2], [4, 4]]),
        (["X", "<s>", " b"], ["x", "<s>", " b"], [[2, 2]]),
    ],
)
def test_align_literal_texts_that_differ_give_the_pairs_worked_out(student, teacher, expected):
    assert pairs_of(student, teacher) == expected
    assert pairs_of(teacher, student) == [[j, i] for i, j in expected]


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (["Hi", " there", "!"], ["H", "i", " there", "!"], [[0, 0], [1, 2], [2, 3]]),
        (["ab", "c"], ["a", "bc"], [[0, 0]]),
        (["a", " b", "c"], ["a", " ", "bc"], [[0, 0], [1, 1]]),
        (["a", "\n\n", "b"], ["a", "\n", "\n", "b"], [[0, 0], [1, 1], [2, 3]]),
        (["a", "\n", "\n", "b"], ["a", "\n\n", "b"], [[0, 0], [1, 1], [3, 2]]),
        (["X", "a", "b", "c"], ["Y", "a", "b", "c"], [[2, 2], [3, 3]]),
        (["a", "b"], ["a"], [[0, 0]]),
        # An end meets an end, nothing else, and what follows it is no part of the text
        (["a", "</s>"], ["a", "</s>"], [[0, 0], [1, 1]]),
        (["a", "</s>"], ["a", "b"], [[0, 0]]),
        (["a", "b"], ["a", "</s>"], [[0, 0]]),
        (["a", "</s>", "\n"], ["a", "</s>", "\n"], [[0, 0], [1, 1]]),
        (["a", "\n", "</s>"], ["a", "\n", "</s>"], [[0, 0], [1, 1], [2, 2]]),
        (["a", "<s>", "b"], ["a", "<s>", "b"], [[0, 0], [2, 2]]),
        ([], ["a"], []),
        (["a"], [], []),
    ],
)
def test_align_by_context_pairs_whatever_continues_the_same_text(student, teacher, expected):
    assert pairs_of(student, teacher, by="context") == expected


def test_align_words_that_recur_are_matched_between_two_differences():
    # `difflib` takes no word for an anchor that is more than a hundredth of 200 words or more, unless it is told to
    words = [f" {word}" for word in "abcdefghijklmnopqrst"] * 15
    expected = [[i, i + 1] for i in range(1, 301)]
    assert pairs_of(["X", *words, " Y"], ["x", " z", *words, " y"]) == expected


def test_align_unknown_ids_are_never_aligned():
    tokens, ids = literal(["a", " b"])
    unknown = len(tokens.table)
    assert align(tokens, tokens, [*ids, unknown, -1, *ids], [unknown, *ids, -1, *ids]).tolist() == [
        [0, 1],
        [1, 2],
        [4, 4],
        [5, 5],
    ]
    unigram = side("unigram")[1]
    assert align(unigram, unigram, [2, 2], [2, 2]).tolist() == []


def test_align_accepts_lists_tuples_and_arrays():
    tokens, ids = literal(["a", " b"])
    for kind in (list, tuple, np.array, lambda ids: np.array(ids, dtype=np.int32)):
        assert align(tokens, tokens, kind(ids), kind(ids)).tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize("is_student", [True, False])
def test_align_first_takes_off_the_space_before_a_text(is_student):
    (sentencepiece, tokens), (byte_level, byte_tokens) = side("sentencepiece"), side("bytes")
    ids = [1, *encode(sentencepiece, "I")]
    assert [tokens.table[i] for i in ids] in ([b"", b" ", b"I"], [b"", b" I"])
    other = encode(byte_level, "I")
    sides = [(tokens, ids), (byte_tokens, other)]
    (a, a_ids), (b, b_ids) = sides if is_student else sides[::-1]
    name = "student_first" if is_student else "teacher_first"
    last = [len(ids) - 1, 0]
    found = align(a, b, a_ids, b_ids, **{name: True}).tolist()
    assert found == [last if is_student else last[::-1]]
    # The flag of the side that adds no space changes nothing
    other_name = "teacher_first" if is_student else "student_first"
    without = align(a, b, a_ids, b_ids).tolist()
    assert align(a, b, a_ids, b_ids, **{other_name: True}).tolist() == without


def test_align_first_pairs_a_word_with_its_space_taken_off():
    teacher, _ = literal(["the", " the"])
    tokenizer, tokens = side("unigram")
    ids = encode(tokenizer, "the the")
    assert [tokens.table[i] for i in ids] == [b" the", b" the"]
    assert align(tokens, teacher, ids, [0, 1], student_first=True).tolist() == [[0, 0], [1, 1]]
    assert align(tokens, teacher, ids, [0, 1]).tolist() == [[1, 1]]
    assert align(teacher, tokens, [0, 1], ids, teacher_first=True).tolist() == [[0, 0], [1, 1]]
    # One space only, and only where one is
    assert align(tokens, teacher, [tokens.ids[b"s"]], [0], student_first=True).tolist() == []
    assert align(tokens, tokens, ids, ids, student_first=True).tolist() == [[1, 1]]
    assert align(tokens, tokens, ids, ids, student_first=True, teacher_first=True).tolist() == [[0, 0], [1, 1]]


def test_align_repetitive_text_takes_no_longer_than_others():
    tokenizer, tokens = side("bytes")
    rng = random.Random(0)
    text = "no " * 4000
    changed = list(text)
    for _ in range(400):
        changed[rng.randrange(len(text))] = "?"
    ids, other = encode(tokenizer, text), encode(tokenizer, "".join(changed))
    start = time.process_time()
    assert len(align(tokens, tokens, ids, other)) > 0
    # 0.05 s; 7 s if `difflib` were to look at every pair of equal words
    assert time.process_time() - start < 2


@pytest.mark.parametrize(("student", "teacher"), product(MAKERS, repeat=2))
def test_align_random_texts_agree_with_the_reference(student, teacher):
    rng = random.Random(f"{student} {teacher}")
    (tokenizer, tokens), (teacher_tokenizer, teacher_tokens) = side(student), side(teacher)
    for _ in range(40):
        text = random_text(rng)
        ids, teacher_ids = encode(tokenizer, text), encode(teacher_tokenizer, text)
        flags = {"student_first": rng.random() < 0.5, "teacher_first": rng.random() < 0.5}
        pairs = check(tokens, teacher_tokens, ids, teacher_ids, **flags)
        if student == teacher and flags["student_first"] == flags["teacher_first"]:
            is_aligned = tokens.lengths[ids] > 0
            if flags["student_first"] and tokens.adds_space and ids and tokens.table[ids[0]] == b" ":
                is_aligned[0] = False
            expected = [[i, i] for i in np.flatnonzero(is_aligned)]
            assert pairs.tolist() == expected
        # Cut on one side
        keep = rng.randint(0, len(ids))
        check(tokens, teacher_tokens, ids[:keep], teacher_ids, **flags)
        # White space around it that only one side has
        around = rng.choice(["\n", " ", "\n\n"]) + text + rng.choice(["\n", "  "])
        check(tokens, teacher_tokens, encode(tokenizer, around), teacher_ids)


@pytest.mark.parametrize(("student", "teacher"), product(FAITHFUL, repeat=2))
def test_align_pairs_cover_what_the_tokenizers_own_offsets_say(student, teacher):
    rng = random.Random(2)
    (tokenizer, tokens), (teacher_tokenizer, teacher_tokens) = side(student), side(teacher)
    # Characters that each tokenizer gives offsets for byte by byte say nothing; neither does where it lays a space
    words = ["the", "fox", "river", "Hello", "cat", "half", ".", ",", "1234", "x=[1]", "others"]
    for _ in range(20):
        text = "a" + "".join(rng.choice([" ", "\n", ""]) + rng.choice(words) for _ in range(30))
        encoded = tokenizer.backend_tokenizer.encode(text), teacher_tokenizer.backend_tokenizer.encode(text)
        spans = [[solid_span(text, offsets) for offsets in side.offsets] for side in encoded]
        pairs = {tuple(pair) for pair in align(tokens, teacher_tokens, encoded[0].ids, encoded[1].ids).tolist()}
        table = [
            [part.table[i] for i in side.ids] for part, side in zip((tokens, teacher_tokens), encoded, strict=True)
        ]
        expected = {
            (i, j)
            for i, span in enumerate(spans[0])
            for j, other in enumerate(spans[1])
            if span == other and span[0] < span[1] and table[0][i] == table[1][j]
        }
        assert expected <= pairs
        assert all(spans[0][i][0] == spans[0][i][1] for i, _ in pairs - expected)
        assert len(expected) > 5


def solid_span(text, offsets):
    start, end = offsets
    while start < end and text[start].isspace():
        start += 1
    while start < end and text[end - 1].isspace():
        end -= 1
    return start, end


@pytest.mark.parametrize(("student", "teacher"), product(["bytes", "other_bytes", "sentencepiece"], repeat=2))
def test_align_rollouts_of_random_ids_agree_with_the_reference(student, teacher):
    rng = random.Random(3)
    (tokenizer, tokens), (teacher_tokenizer, teacher_tokens) = side(student), side(teacher)
    aligned = 0
    for _ in range(30):
        # Invalid UTF-8, special tokens, and ids of a padded head; the teacher reads them as text
        ids = rng.choices(range(len(tokenizer)), k=60) + encode(tokenizer, random_text(rng))
        teacher_ids = encode(teacher_tokenizer, tokens.decode(ids))
        aligned += len(check(tokens, teacher_tokens, ids, teacher_ids))
        check(tokens, teacher_tokens, ids, ids[::-1] if student == teacher else teacher_ids[::-1])
    assert aligned > 200


@pytest.mark.parametrize(("student", "teacher"), product(["bytes", "other_bytes"], repeat=2))
def test_align_random_special_tokens_agree_with_the_reference(student, teacher):
    rng = random.Random(4)
    (tokenizer, tokens), (teacher_tokenizer, teacher_tokens) = side(student), side(teacher)

    def strew(tokenizer, ids):
        for _ in range(rng.randint(0, 4)):
            special = tokenizer.convert_tokens_to_ids(rng.choice([END_OF_TEXT, IM_START, IM_END, IM_END]))
            place = rng.choice([0, len(ids), rng.randint(0, len(ids))])
            ids = ids[:place] + [special] + ids[place:]
        return ids

    for _ in range(150):
        text = "".join(rng.choices(["the", " fox", "\n", " ", "X"], k=rng.randint(0, 4)))
        ids, teacher_ids = encode(tokenizer, text), encode(teacher_tokenizer, text)
        check(tokens, teacher_tokens, strew(tokenizer, ids), strew(teacher_tokenizer, teacher_ids))


@pytest.mark.parametrize(("student", "teacher"), product(["bytes", "other_bytes", "metaspace"], repeat=2))
def test_align_by_context_agrees_with_a_loop_over_texts(student, teacher):
    rng = random.Random(5)
    (tokenizer, tokens), (teacher_tokenizer, teacher_tokens) = side(student), side(teacher)
    for _ in range(40):
        text = random_text(rng).replace("▁", "")
        ids, teacher_ids = encode(tokenizer, text), encode(teacher_tokenizer, text)
        before = [tokens.text(ids[:i]) for i in range(len(ids))]
        teacher_before = [teacher_tokens.text(teacher_ids[:i]) for i in range(len(teacher_ids))]
        expected = [[i, teacher_before.index(part)] for i, part in enumerate(before) if part in teacher_before]
        assert align(tokens, teacher_tokens, ids, teacher_ids, by="context").tolist() == expected
        both = align(tokens, teacher_tokens, ids, teacher_ids).tolist()
        assert all(pair in expected for pair in both)


def test_align_lowercasing_teacher_keeps_what_it_did_not_change():
    (student, tokens), (teacher, teacher_tokens) = side("wordpiece"), side("lowercase")
    text = 'The bird said, "Hello, fox! Why are you sad today?" One day the fox met a red bird.'
    ids, teacher_ids = encode(student, text), encode(teacher, text)
    pairs = check(tokens, teacher_tokens, ids, teacher_ids)
    words = [student.convert_ids_to_tokens(ids[i]) for i, _ in pairs.tolist()]
    for word in ("bird", "fox", "are", "you", "day", "the", "red", ",", '"', "!", "?", "."):
        assert word in words
    assert len(pairs) > 0.8 * len(ids) - 8


def row_of(student, teacher, eos=("</s>",), **options):
    """Partners of two rows, each given as stretches of pieces between stretches that are not trained, given as -1."""
    sides = []
    for pieces in (student, teacher):
        tokens, ids = literal([piece for piece in pieces if piece != -1], eos)
        ids = iter(ids)
        sides.append((tokens, [-100 if piece == -1 else next(ids) for piece in pieces]))
    (student, labels), (teacher, teacher_labels) = sides
    partners = align_row(student, teacher, labels, teacher_labels, **options)
    assert partners.dtype == np.int64 and partners.shape == (len(labels),)
    return partners.tolist()


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ([-1, "a", " b"], [-1, -1, "a", " b"], [-1, 2, 3]),
        ([-1, "ab", "c", "</s>"], [-1, "a", "b", "c", "<end>"], [-1, -1, 3, 4]),
        # Turn by turn, whatever is between; the same words elsewhere are no partners
        ([-1, "a", "</s>", -1, -1, "a", "c", "</s>"], [-1, "a", -1, "c", "</s>"], [-1, 1, -1, -1, -1, -1, 3, 4]),
        ([-1, "a", -1, "b", -1], [-1, "a", -1, "b", -1], [-1, 1, -1, 3, -1]),
        # The teacher's row has room for one turn only, or the student's
        ([-1, "a", -1, "b"], [-1, "a"], [-1, 1, -1, -1]),
        ([-1, "a"], [-1, "a", -1, "a"], [-1, 1]),
        # Nothing predicts the first token, on either side
        (["a", "b"], ["a", "b"], [-1, 1]),
        ([-1, "a", "b"], ["a", "b"], [-1, -1, 1]),
        (["a", "b"], [-1, "a", "b"], [-1, 2]),
        # Nothing trained
        ([-1, -1], [-1, "a"], [-1, -1]),
        ([-1, "a"], [-1, -1], [-1, -1]),
        ([], [], []),
        # One side is cut
        ([-1, "a", "b", "</s>"], [-1, "a"], [-1, 1, -1, -1]),
    ],
)
def test_align_row_literal_rows_give_the_partners_worked_out(student, teacher, expected):
    assert row_of(student, teacher, eos=("</s>", "<end>")) == expected


def test_align_row_by_context_pairs_whatever_continues_the_same_text():
    student, teacher = [-1, "ab", "c", -1, "de", "</s>"], [-1, "a", "b", "cd", -1, -1, "d", "e", "</s>"]
    assert row_of(student, teacher) == [-1, -1, -1, -1, -1, 8]
    assert row_of(student, teacher, by="context") == [-1, 1, 3, -1, 6, 8]


def test_align_row_start_of_a_row_has_no_space_before_it():
    tokenizer, tokens = side("unigram")
    teacher, _ = literal(["the", " the"])
    ids = encode(tokenizer, "the the")
    assert len(ids) == 2
    bos = tokenizer.convert_tokens_to_ids("<pad>")
    end = [teacher.table.index(b"the"), teacher.table.index(b" the")]
    # The first text of the row, behind a special token; then a text inside the row
    assert align_row(tokens, teacher, [bos, *ids], [-100, *end]).tolist() == [-1, 1, 2]
    assert align_row(tokens, teacher, [-100, *ids], [-100, *end]).tolist() == [-1, -1, 2]
    assert align_row(teacher, tokens, [-100, *end], [bos, *ids]).tolist() == [-1, 1, 2]
    assert align_row(teacher, tokens, [-100, *end], [-100, *ids]).tolist() == [-1, -1, 2]


OTHER_TEMPLATE = (
    "{%- for message in messages -%}{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '</s>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- '[ ' + message['content'] + ' ]\n' -}}{%- endif -%}{%- endfor -%}"
)


def test_align_row_templates_that_differ_pair_turn_by_turn():
    student, teacher = make_tokenizer(), sentencepiece_like(replacing_decoder(), "never")
    teacher.chat_template = OTHER_TEMPLATE
    turns = ["The sky is blue.", "Hello, fox!\n\nWhy are you sad today? 😀", "The sky is blue."]
    messages = [
        {"role": role, "content": content}
        for turn in turns
        for role, content in (("user", "The sky is blue."), ("assistant", turn))
    ]
    rows = [
        prepare_dataset(
            Dataset.from_list([{"messages": messages}]),
            tokenizer,
            max_length=None,
            eos_token_ids=[],
            assistant_only_loss=True,
        )[0]
        for tokenizer in (student, teacher)
    ]
    tokens, teacher_tokens = TokenBytes(student), TokenBytes(teacher)
    labels, teacher_labels = (row["labels"] for row in rows)
    partners = align_row(tokens, teacher_tokens, labels, teacher_labels)
    ends = [i for i, label in enumerate(labels) if label == student.eos_token_id]
    teacher_ends = [i for i, label in enumerate(teacher_labels) if label == teacher.eos_token_id]
    assert len(ends) == 3 and partners[ends].tolist() == teacher_ends
    paired = np.flatnonzero(partners >= 0)
    assert 20 < len(paired) < sum(label != -100 for label in labels)
    assert (np.diff(partners[paired]) > 0).all()
    for start, end, teacher_start, teacher_end in zip(
        [0, *ends], ends, [0, *teacher_ends], teacher_ends, strict=False
    ):
        inside = [i for i in paired if start < i < end]
        assert all(teacher_start < partners[i] < teacher_end for i in inside)
        assert all(tokens.table[labels[i]] == teacher_tokens.table[teacher_labels[partners[i]]] for i in inside)
        ids = [label for label in labels[start + 1 : end] if label != -100]
        teacher_ids = [label for label in teacher_labels[teacher_start + 1 : teacher_end] if label != -100]
        assert len(reference(tokens, teacher_tokens, ids, teacher_ids)[0]) == len(inside)


REAL = ["tokenizers/gpt2", "tokenizers/mistral", "tokenizers/qwen", "models/stories260K"]


@cache
def real_side(path):
    if not (SHARED / path).is_dir():
        pytest.skip(f"{path} is not in ../shared/data")
    tokenizer = AutoTokenizer.from_pretrained(SHARED / path)
    return tokenizer, TokenBytes(tokenizer)


@cache
def real_texts():
    path = SHARED / "gsm8k/test.jsonl"
    if not path.is_file():
        pytest.skip("gsm8k is not in ../shared/data")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:15]]
    odd = [
        "",
        " ",
        "\n",
        "  Two spaces  \n",
        "def f(x):\n\treturn x  # é\n",
        "naïve 你好，世界 😀👩‍👧 हिन्दी",
        "a\r\n\r\nb",
    ]
    return [row["answer"] for row in rows] + odd


@pytest.mark.parametrize("path", REAL)
def test_token_bytes_real_tokenizer_writes_the_text_it_read(path):
    tokenizer, tokens = real_side(path)
    for text in real_texts():
        ids = encode(tokenizer, text)
        assert tokens.text(ids).removeprefix(b" " * tokens.adds_space) == text.encode().removeprefix(
            b" " * tokens.adds_space
        )
        assert tokens.lengths[ids].sum() == len(tokens.text(ids))
    assert len(tokens.table) == len(tokenizer)
    assert tokens.kinds[tokenizer.eos_token_id] == 1


@pytest.mark.parametrize(("student", "teacher"), product(REAL, repeat=2))
def test_align_real_tokenizers_agree_with_the_reference(student, teacher):
    (tokenizer, tokens), (teacher_tokenizer, teacher_tokens) = real_side(student), real_side(teacher)
    for text in real_texts():
        ids = encode(tokenizer, text) + [tokenizer.eos_token_id]
        teacher_ids = encode(teacher_tokenizer, text) + [teacher_tokenizer.eos_token_id]
        pairs = check(tokens, teacher_tokens, ids, teacher_ids, student_first=True, teacher_first=True).tolist()
        assert pairs[-1] == [len(ids) - 1, len(teacher_ids) - 1]
        if student == teacher:
            pieces = [tokens.table[i] for i in ids]
            is_lost = tokens.adds_space and pieces[0] == b" "
            assert pairs == [[i, i] for i in range(is_lost, len(ids))]


def test_align_gpt2_and_mistral_give_the_pairs_worked_out():
    (gpt2, student), (mistral, teacher) = real_side("tokenizers/gpt2"), real_side("tokenizers/mistral")
    ids, teacher_ids = encode(gpt2, "Hi there\nnaïve"), mistral("Hi there\nnaïve")["input_ids"]
    assert gpt2.convert_ids_to_tokens(ids) == ["Hi", "Ġthere", "Ċ", "na", "Ã¯ve"]
    assert mistral.convert_ids_to_tokens(teacher_ids) == ["<s>", "▁Hi", "▁there", "<0x0A>", "na", "ï", "ve"]
    assert align(student, teacher, ids, teacher_ids).tolist() == [[1, 2], [2, 3], [3, 4]]
    with_first = align(student, teacher, ids, teacher_ids, teacher_first=True)
    assert with_first.tolist() == [[0, 1], [1, 2], [2, 3], [3, 4]]
    mapped = vocabulary_map(teacher, student)
    others = gpt2.convert_tokens_to_ids(["ĠHi", "Ġthere", "Ċ", "na", "Ã¯", "ve"])
    assert mapped[teacher_ids].tolist() == [-1, *others]
    assert mapped[mistral.eos_token_id] == gpt2.eos_token_id


class Pretrained:
    """In place of `AutoTokenizer`."""

    @staticmethod
    def from_pretrained(name):
        return real_side(f"tokenizers/{name}")[0]


@pytest.mark.parametrize("subject", [TokenBytes, vocabulary_map, align, align_row])
def test_example_with_real_tokenizers_gives_what_it_says(subject):
    text = re.sub(r"^ *```(python)?$", "", subject.__doc__, flags=re.M)
    (gpt2_tokenizer, gpt2), (mistral_tokenizer, mistral) = (real_side(f"tokenizers/{n}") for n in ("gpt2", "mistral"))
    names = {"gpt2": gpt2, "mistral": mistral, "gpt2_tokenizer": gpt2_tokenizer, "AutoTokenizer": Pretrained}
    names |= {"mistral_tokenizer": mistral_tokenizer, "TokenBytes": TokenBytes}
    names |= {"vocabulary_map": vocabulary_map, "align": align, "align_row": align_row}
    example = doctest.DocTestParser().get_doctest(text, names, subject.__name__, None, None)
    assert len(example.examples) > 0
    assert doctest.DocTestRunner(verbose=False).run(example).failed == 0
