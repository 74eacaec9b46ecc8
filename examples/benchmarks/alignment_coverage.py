"""
How many tokens of a student find a partner among a teacher's, beside the alignment of TRL's GOLD, and in what time.

    python examples/benchmarks/alignment_coverage.py
    python examples/benchmarks/alignment_coverage.py --tokenizers gpt2 Qwen/Qwen2.5-0.5B --num_rows 500

A row is one text (Dolly's responses, GSM8K's answers, TinyStories) as each tokenizer writes it alone, with an EOS
behind. All figures are shares of the student's tokens, the EOS included:

* paired: have a partner (`trl_kd.data.align`).
* by context: have one by `align(by="context")`, the tokens before which the same text stands.
* GOLD 1:1: are alone in a group with one token of the teacher that stands for the same bytes (`ULDLoss`, which walks
  over both sides' byte offsets and closes a group where they meet).
* GOLD grouped: are in a group that both sides closed at the same byte, of whatever sizes. What is left when one side
  ends is one more group for GOLD; it doesn't count.

GOLD takes its offsets from byte-level tokenizers alone and refuses the others. Where it refuses one of a pair, its
figures are marked with *: they are those of its walk over offsets that were made here.

The time is the median CPU time of `align` for rows of 512 tokens of the student's, made of the same texts end to end.
Every pair is checked: same bytes, at the same place of the same text. Ends with status 1 if one is wrong, or if fewer
tokens are paired than GOLD has 1:1.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from itertools import permutations, product
from pathlib import Path

import numpy as np
from floors import show
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl.experimental.gold.gold_trainer import ULDLoss
from trl.experimental.utils import encode_with_byte_offsets

from trl_kd.data import TokenBytes, align


DATA = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
TOKENIZERS = [
    str(DATA / path) for path in ("tokenizers/gpt2", "tokenizers/qwen", "tokenizers/mistral", "models/stories260K")
]
LENGTH = 512

Offsets = list[tuple[int, int]]


@dataclass(frozen=True)
class Side:
    """A tokenizer, and what its ids stand for."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    tokens: TokenBytes

    @classmethod
    def load(cls, path: str) -> "Side":
        """By a folder or a name on the Hub."""
        tokenizer = AutoTokenizer.from_pretrained(path)
        return cls(Path(path).name, tokenizer, TokenBytes(tokenizer))

    def encode(self, text: str) -> list[int]:
        """Ids of a text that stands alone, with an EOS."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return [*ids, self.tokenizer.eos_token_id]

    def pieces(self, ids: list[int]) -> list[bytes]:
        """Bytes of each token, without the space that the tokenizer puts before the text."""
        pieces = [self.tokens.table[i] for i in ids]
        if self.tokens.adds_space:
            pieces[0] = pieces[0].removeprefix(b" ")
        return pieces

    def gold_offsets(self, text: str) -> Offsets | None:
        """Where GOLD takes each token to be, or None if it refuses the tokenizer."""
        try:
            [(_, offsets)] = encode_with_byte_offsets(self.tokenizer.backend_tokenizer, [text])
        except NotImplementedError:
            return None
        length = len(text.encode())
        return [*offsets, (length, length)]


def true_offsets(pieces: list[bytes]) -> Offsets:
    """Where each token is."""
    ends = np.cumsum([len(piece) for piece in pieces]).tolist()
    return [(end - len(piece), end) for piece, end in zip(pieces, ends, strict=True)]


def read(path: str, field: str, num_rows: int) -> list[str]:
    """The first texts of a file of JSON lines."""
    with open(path, encoding="utf-8") as file:
        texts = (json.loads(line)[field] for line in file)
        return [text for text, _ in zip(texts, range(num_rows), strict=False)]


def count_wrong(pairs: np.ndarray, pieces: list[list[bytes]]) -> int:
    """Pairs whose tokens differ or are in different places, white space around the texts left out."""
    wrong = 0
    for i, j in pairs.tolist():
        before = [b"".join(side[:n]).lstrip() for side, n in zip(pieces, (i, j), strict=True)]
        wrong += pieces[0][i] != pieces[1][j] or before[0] != before[1]
    return wrong


def coverage(student: Side, teacher: Side, texts: list[str]) -> tuple[dict[str, float], bool, int]:
    """Shares of the student's tokens, whether GOLD refuses the pair, and how many pairs are wrong."""
    counts = {"tokens": 0, "paired": 0, "context": 0, "one": 0, "grouped": 0}
    is_refused, num_wrong = False, 0
    for text in texts:
        sides = (student, teacher)
        ids = [side.encode(text) for side in sides]
        pieces = [side.pieces(side_ids) for side, side_ids in zip(sides, ids, strict=True)]
        pairs = align(student.tokens, teacher.tokens, *ids, student_first=True, teacher_first=True)
        counts["tokens"] += len(ids[0])
        counts["paired"] += len(pairs)
        by_context = align(student.tokens, teacher.tokens, *ids, student_first=True, teacher_first=True, by="context")
        counts["context"] += len(by_context)
        num_wrong += count_wrong(pairs, pieces)
        offsets = [side.gold_offsets(text) for side in sides]
        if None in offsets:
            is_refused, offsets = True, [true_offsets(side) for side in pieces]
        for ours, theirs in zip(*ULDLoss._align_by_byte_offsets(*offsets), strict=True):
            if not ours or not theirs or offsets[0][ours[-1]][1] != offsets[1][theirs[-1]][1]:
                continue
            counts["grouped"] += len(ours)
            counts["one"] += len(ours) == len(theirs) == 1 and pieces[0][ours[0]] == pieces[1][theirs[0]]
    return {name: count / counts["tokens"] for name, count in counts.items()}, is_refused, num_wrong


def milliseconds(student: Side, teacher: Side, texts: list[str], num_rows: int) -> float:
    """Median CPU time of a row of `LENGTH` tokens of the student's."""
    ids = student.tokenizer("\n\n".join(texts), add_special_tokens=False, verbose=False)["input_ids"]
    rows = [ids[start : start + LENGTH] for start in range(0, len(ids) - LENGTH, LENGTH)][:num_rows]
    seconds = []
    for row in rows:
        text = student.tokens.decode(row).strip("\N{REPLACEMENT CHARACTER}")
        teacher_row = teacher.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        start = time.process_time()
        align(student.tokens, teacher.tokens, row, teacher_row)
        seconds.append(time.process_time() - start)
    return 1000 * statistics.median(seconds)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizers", nargs="+", default=TOKENIZERS, help="Folders or names on the Hub.")
    parser.add_argument("--dolly", default=str(DATA / "instruct" / "dolly" / "dev.jsonl"), help="Rows with `output`.")
    parser.add_argument("--gsm8k", default=str(DATA / "gsm8k" / "train.jsonl"), help="Rows with `answer`.")
    parser.add_argument("--tinystories", default=str(DATA / "tinystories" / "test.jsonl"), help="Rows with `text`.")
    parser.add_argument("--num_rows", type=int, default=200, help="Texts of each.")
    parser.add_argument("--timed_rows", type=int, default=50, help="Most rows to time for a pair of tokenizers.")
    return parser.parse_args()


def main() -> None:
    """Print one table."""
    args = parse_args()
    files = [
        ("dolly", args.dolly, "output"),
        ("gsm8k", args.gsm8k, "answer"),
        ("tinystories", args.tinystories, "text"),
    ]
    texts = [(name, read(path, field, args.num_rows)) for name, path, field in files]
    sides = [Side.load(path) for path in args.tokenizers]
    rows, total_wrong, is_short = [], 0, False
    for (student, teacher), (name, part) in product(permutations(sides, 2), texts):
        shares, is_refused, num_wrong = coverage(student, teacher, part)
        total_wrong += num_wrong
        is_short |= shares["paired"] < shares["one"]
        mark = "*" if is_refused else ""
        cells = [
            f"{shares['paired']:.2%}",
            f"{shares['context']:.2%}",
            f"{shares['one']:.2%}{mark}",
            f"{shares['grouped']:.2%}{mark}",
        ]
        duration = milliseconds(student, teacher, part, args.timed_rows)
        rows.append([student.name, teacher.name, name, *cells, f"{duration:.2f}", str(num_wrong)])
    columns = [
        "student",
        "teacher",
        "texts",
        "paired",
        "by context",
        "GOLD 1:1",
        "GOLD grouped",
        f"ms for {LENGTH} tokens",
        "wrong",
    ]
    show("Share of the student's tokens with a partner (* GOLD refuses a tokenizer of the pair)", columns, rows, True)
    raise SystemExit(1 if total_wrong or is_short else 0)


if __name__ == "__main__":
    main()
