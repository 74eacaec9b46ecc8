"""
What the comparison across vocabularies reads and measures: the student's tokenizer, texts that both models see alike,
and the likelihood of a text under a model, whatever its tokens are.

Everything is text here. A prompt ends with a whole word and a continuation begins with a space, so that a tokenizer
gives the same tokens to a continuation in its place and on its own, and each method sees what the others see.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from stories import COMPLETION_LENGTH, MIN_STORY_LENGTH, PROMPT_LENGTH, as_rows, teacher_texts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from trl_kd.evaluation import sample_completions
from trl_kd.generation import distinct_n
from trl_kd.losses import cross_entropy, entropy


STUDENT_VOCABULARY = 1024
END, PAD = "<|endoftext|>", "<|pad|>"

# Texts are compared up to here, about what 96 tokens of the teacher hold: as far as the training data goes
EVALUATED_BYTES = 192
# More tokens than that takes, so that hardly a sample is cut by its tokens
TEACHER_SAMPLE_LENGTH = 160
STUDENT_SAMPLE_LENGTH = 112

METRICS = {
    "bits_per_byte": "bits per byte, stories",
    "teacher_nats": "teacher's nats per byte",
    "teacher_nats_gap": "above teacher's own",
    "student_entropy": "student entropy per byte",
    "teacher_entropy": "teacher entropy per byte",
    "distinct_2": "distinct-2, words",
    "bytes": "bytes",
    "ended": "ended",
}
"""What [`held_out_evaluation`] measures, in the order of the table, and the titles there."""


@dataclass
class Continuation:
    """A prompt, a text that continues it, and whether the writer ended there (else he was cut off)."""

    prompt: str
    text: str
    ended: bool


def student_tokenizer(folder: str | Path, texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """
    The student's own byte-level BPE, trained on `texts`; read from `folder` if it is there.

    Like GPT-2's and Qwen's, it puts nothing in front of a text: the first token of a prompt is the first of its words.
    """
    folder = Path(folder)
    if not (folder / "tokenizer.json").exists():
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=STUDENT_VOCABULARY,
            special_tokens=[END, PAD],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token=END, eos_token=END, pad_token=PAD, model_max_length=512
        )
        tokenizer.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def byte_level_copy(folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """
    The teacher's tokenizer, a SentencePiece one, as a byte-level BPE with the same ids, saved in `folder`.

    Only the spelling of the tokens changes. Of two that stand for one byte, the one that texts are never split into
    (byte fallback) keeps its old spelling.
    """
    spelling = {byte: char for char, byte in byte_of_char().items()}

    def spell(token: str) -> str:
        if token.startswith("<0x"):
            return spelling[int(token[3:-1], 16)]
        return "".join(spelling[byte] for byte in token.replace("\u2581", " ").encode())

    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    special = set(tokenizer.all_special_ids)
    # Highest ids first: in a SentencePiece vocabulary the bytes are in front
    vocabulary: dict[str, int] = {}
    for token, index in sorted(model["vocab"].items(), key=lambda item: -item[1]):
        spelled = token if index in special else spell(token)
        vocabulary[token if spelled in vocabulary else spelled] = index
    backend = Tokenizer(models.BPE(vocabulary, [tuple(map(spell, pair)) for pair in model["merges"]]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = tokenizer.backend_tokenizer.post_processor
    special_tokens = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special_tokens).save_pretrained(folder)
    return Path(folder)


def byte_of_char() -> dict[str, int]:
    """The byte that each character stands for in the vocabulary of a byte-level BPE."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def load_texts(path: str) -> list[str]:
    """Stories as they are written."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def whole_words(text: str) -> str:
    """A text that was cut anywhere, without its last word, of which there may be more."""
    return text[: text.rfind(" ")] if " " in text else ""


def split_texts(stories: Sequence[str], teacher: PreTrainedTokenizerBase) -> list[Continuation]:
    """Stories that are long enough, as in `stories.py`: a prompt of at most 64 teacher tokens, and all of the rest."""
    rows = []
    for story in stories:
        ids = teacher(story, verbose=False)["input_ids"]
        prompt = whole_words(teacher.decode(ids[:PROMPT_LENGTH], skip_special_tokens=True))
        if len(ids) >= MIN_STORY_LENGTH and prompt and story.startswith(f"{prompt} "):
            rows.append(Continuation(prompt, story[len(prompt) :], ended=True))
    return rows


def first_tokens(row: Continuation, teacher: PreTrainedTokenizerBase) -> Continuation:
    """A continuation cut after 96 teacher tokens, to whole words."""
    prompt_ids = teacher(row.prompt)["input_ids"]
    ids = teacher(row.prompt + row.text, verbose=False)["input_ids"]
    end = len(prompt_ids) + COMPLETION_LENGTH
    if len(ids) < end:
        return row
    text = whole_words(teacher.decode(ids[:end], skip_special_tokens=True)[len(row.prompt) :])
    return Continuation(row.prompt, text, ended=False)


def first_bytes(row: Continuation) -> Continuation:
    """A continuation cut after `EVALUATED_BYTES`, to whole words; one that was cut off before, to whole words."""
    text = row.text.encode()
    if row.ended and len(text) <= EVALUATED_BYTES:
        return row
    # One byte more: a word that ends exactly at the limit is whole
    text = text[: EVALUATED_BYTES + 1]
    return Continuation(row.prompt, text[: max(text.rfind(b" "), 0)].decode(errors="replace"), ended=False)


def written_by_teacher(
    file: str | Path,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    texts_per_story: int,
) -> list[Continuation]:
    """
    Continuations that the teacher samples, of up to 96 of its tokens.

    Left out are those that the teacher's tokenizer would write with other tokens than were sampled: read as text, they
    would not be what the teacher wrote.
    """
    prompt_ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    rows = []
    for prompt, ids in zip(*teacher_texts(file, teacher, prompt_ids, texts_per_story), strict=True):
        row = as_continuation(tokenizer, prompt, ids)
        if not row.ended:
            row.text = whole_words(row.text)
        again = tokenizer(row.prompt + row.text)["input_ids"]
        length = len(again) - len(prompt)
        if row.text.startswith(" ") and again == prompt + ids[:length] and (not row.ended or length == len(ids) - 1):
            rows.append(row)
    return rows


def as_continuation(tokenizer: PreTrainedTokenizerBase, prompt: list[int], completion: list[int]) -> Continuation:
    """Token ids as text."""
    ended = completion[-1] == tokenizer.eos_token_id
    prompt_text = tokenizer.decode(prompt, skip_special_tokens=True)
    # Together, because a tokenizer may drop a space at the start of a text
    text = tokenizer.decode(prompt + completion, skip_special_tokens=True)[len(prompt_text) :]
    return Continuation(prompt_text, text, ended)


def as_dataset(rows: Sequence[Continuation]) -> Dataset:
    """Rows of text, as trl_kd and TRL read them; `truncated` says that no end of text is to be learnt there."""
    return Dataset.from_list([{"prompt": r.prompt, "completion": r.text, "truncated": not r.ended} for r in rows])


def as_tokens(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The same tokenised, for trainers that would end every completion."""
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows]
    completions = [
        tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id] * (not row["truncated"]) for row in rows
    ]
    return as_rows(prompts, completions)


@torch.no_grad()
def score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Continuation], batch_size: int = 64
) -> dict[str, float]:
    """
    Nats of all continuations under a model, and the entropies of its next tokens on the way, summed.

    A continuation has the likelihood of prompt and continuation less that of the prompt, each in the tokens that the
    tokenizer gives it. The end of a text that was ended counts, as one more token; it has no bytes.
    """
    model.eval()
    end = [tokenizer.eos_token_id]
    texts = [tokenizer(row.prompt + row.text)["input_ids"] + end * row.ended for row in rows]
    prompts = [tokenizer(row.prompt)["input_ids"] for row in rows]
    sums = {"nats": 0.0, "entropy": 0.0, "tokens": 0.0}
    for sequences, sign in ((texts, 1), (prompts, -1)):
        for start in range(0, len(rows), batch_size):
            batch = sequences[start : start + batch_size]
            length = max(map(len, batch))
            input_ids = torch.tensor([ids + [0] * (length - len(ids)) for ids in batch])
            mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in batch])
            # Logits at position i predict token i + 1
            logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            logits, labels = logits[mask[:, 1:].bool()], input_ids[:, 1:][mask[:, 1:].bool()]
            sums["nats"] += sign * cross_entropy(logits, labels).double().sum().item()
            sums["entropy"] += sign * entropy(logits).double().sum().item()
            sums["tokens"] += sign * len(labels)
    return sums


def held_out_evaluation(
    teacher: PreTrainedModel, teacher_tokenizer: PreTrainedTokenizerBase, stories: Sequence[str], draws: int
) -> Callable[[PreTrainedModel, PreTrainedTokenizerBase, int], dict[str, float]]:
    """A function that judges a model on held-out stories; each student meets the same prompts and the same noise."""
    references = split_texts(stories, teacher_tokenizer)
    prompts = [row.prompt for row in references] * draws
    references = [first_bytes(row) for row in references]

    def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> list[Continuation]:
        ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        completions = sample_completions(
            model,
            ids,
            max_new_tokens=max_new_tokens,
            batch_size=128,
            eos_token_ids=[tokenizer.eos_token_id],
            progress=False,
        )
        return [first_bytes(as_continuation(tokenizer, *pair)) for pair in zip(ids, completions, strict=True)]

    def nats_of_samples(rows: Sequence[Continuation]) -> tuple[float, float]:
        sums = score(teacher, teacher_tokenizer, rows)
        return sums["nats"] / num_bytes(rows), sums["entropy"] / num_bytes(rows)

    own, _ = nats_of_samples(sample(teacher, teacher_tokenizer, TEACHER_SAMPLE_LENGTH))

    def evaluate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> dict[str, float]:
        rows = sample(model, tokenizer, max_new_tokens)
        teacher_nats, teacher_entropy = nats_of_samples(rows)
        given = score(model, tokenizer, references)
        return {
            "bits_per_byte": given["nats"] / math.log(2) / num_bytes(references),
            "teacher_nats": teacher_nats,
            "teacher_nats_gap": teacher_nats - own,
            "student_entropy": score(model, tokenizer, rows)["entropy"] / num_bytes(rows),
            "teacher_entropy": teacher_entropy,
            "distinct_2": distinct_n([row.text.split() for row in rows], 2),
            "bytes": num_bytes(rows) / len(rows),
            "ended": sum(row.ended for row in rows) / len(rows),
            "tokens_per_byte": given["tokens"] / num_bytes(references),
        }

    return evaluate


def num_bytes(rows: Sequence[Continuation]) -> int:
    """Length of all continuations together."""
    return sum(len(row.text.encode()) for row in rows)
