"""
Tasks that are known exactly, texts of them, and the models that learn them.

A task says which words may follow in a state, with what weights, and what state a word leads to. Texts are written
word by word from that, with a slip of the pen in one word of a hundred, after which the text goes on as if nothing had
happened: a teacher that never saw an error would have no opinion on how to go on after a student's.

    <s> blue 3 a a b c note 3 b b a c ? 3 </s>      `Note`
    <s> ( [ ] { } ) ( [ { } ] ) [ ] </s>            `Brackets`
    <s> w y y x z w x z y z </s>                    `Noise`
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)


PAD, BOS, EOS = "<pad>", "<s>", "</s>"
SPECIAL = {PAD: 0, BOS: 1, EOS: 2}
SLIP = 0.01

Weights = dict[str, float]


@dataclass(frozen=True)
class Note:
    """
    A key, words in between, perhaps a note of the key, words in between, the key.

    The prompt is a colour and a key. A blue one has a note in 3 texts of 10, a red one in 7. Either way the text is
    equally long, and ends with `?` and the key, which a student that sees six words finds in the note alone.
    """

    name: ClassVar[str] = "note"
    can_fail: ClassVar[bool] = True
    window: ClassVar[int] = 6
    teacher_layers: ClassVar[int] = 2
    gap: ClassVar[int] = 4
    length: ClassVar[int] = 2 * gap + 4
    keys: ClassVar[tuple[str, ...]] = ("1", "2", "3", "4")
    between: ClassVar[dict[str, Weights]] = {
        "a": {"a": 0.6, "b": 0.3, "c": 0.1},
        "b": {"a": 0.1, "b": 0.6, "c": 0.3},
        "c": {"a": 0.3, "b": 0.1, "c": 0.6},
    }
    words: ClassVar[tuple[str, ...]] = (*keys, *between, "note", "none", "?", "blue", "red")

    def prompt(self, rng: random.Random) -> list[str]:
        """What a text begins with."""
        return [rng.choice(("blue", "red")), rng.choice(self.keys)]

    def start(self, prompt: Sequence[str]) -> tuple:
        """State after a prompt: colour, key, the last word in between, whether there is a note."""
        return (*prompt, "a", False)

    def following(self, state: tuple, position: int) -> Weights:
        """Words that may follow, with their weights."""
        colour, key, last, has_note = state
        if position == self.gap:
            share = 0.3 if colour == "blue" else 0.7
            return {"note": share, "none": 1 - share}
        if position == self.length - 2:
            return {"?": 1.0}
        if position == self.length - 1 or (position == self.gap + 1 and has_note):
            return {key: 1.0}
        return self.between[last]

    def after(self, state: tuple, word: str, position: int) -> tuple:
        """The state that a word leads to."""
        colour, key, last, has_note = state
        return (
            colour,
            key,
            word if word in self.between else last,
            has_note or (position == self.gap and word == "note"),
        )

    def choice(self, completion: Sequence[str]) -> float:
        """Whether there is a note."""
        return float(len(completion) > self.gap and completion[self.gap] == "note")


@dataclass(frozen=True)
class Brackets:
    """
    Balanced brackets of three kinds, at most five deep, all texts of 14 equally likely.

    A student that sees five words does not know what is to be closed once it has gone deeper.
    """

    name: ClassVar[str] = "brackets"
    can_fail: ClassVar[bool] = True
    window: ClassVar[int] = 5
    teacher_layers: ClassVar[int] = 3
    depth: ClassVar[int] = 5
    length: ClassVar[int] = 14
    closing: ClassVar[dict[str, str]] = {"(": ")", "[": "]", "{": "}"}
    words: ClassVar[tuple[str, ...]] = (*closing, *closing.values())
    _ways: dict = field(default_factory=dict, compare=False)

    def ways(self, depth: int, left: int) -> int:
        """In how many ways brackets can be opened and closed, from a depth, with some words left."""
        if not 0 <= depth <= min(self.depth, left):
            return 0
        if left == 0:
            return 1
        if (depth, left) not in self._ways:
            self._ways[depth, left] = self.ways(depth + 1, left - 1) + self.ways(depth - 1, left - 1)
        return self._ways[depth, left]

    def prompt(self, rng: random.Random) -> list[str]:
        """Nothing but `<s>`."""
        return []

    def start(self, prompt: Sequence[str]) -> tuple:
        """State: the brackets that are open."""
        return ()

    def following(self, state: tuple, position: int) -> Weights:
        """Words that may follow, with their weights."""
        left = self.length - position - 1
        up, down = self.ways(len(state) + 1, left), self.ways(len(state) - 1, left)
        weights = dict.fromkeys(self.closing, float(up)) if up else {}
        if down:
            weights[self.closing[state[-1]]] = float(len(self.closing) * down)
        if weights:
            return weights
        # After an error that no text can make good: close what is open
        return {self.closing[state[-1]]: 1.0} if state else dict.fromkeys(self.closing, 1.0)

    def after(self, state: tuple, word: str, position: int) -> tuple:
        """The state that a word leads to."""
        return (*state, word)[-self.depth :] if word in self.closing else state[:-1]

    def choice(self, completion: Sequence[str]) -> float:
        """The greatest depth."""
        depth = deepest = 0
        for word in completion:
            depth += 1 if word in self.closing else -1
            deepest = max(deepest, depth)
        return float(deepest)


@dataclass(frozen=True)
class Noise:
    """Random weights after every five words, nothing to plan for: the control. No text is wrong."""

    name: ClassVar[str] = "noise"
    can_fail: ClassVar[bool] = False
    window: ClassVar[int] = 2
    teacher_layers: ClassVar[int] = 2
    order: ClassVar[int] = 5
    length: ClassVar[int] = 10
    scale: ClassVar[float] = 1.5
    words: ClassVar[tuple[str, ...]] = ("w", "x", "y", "z")

    def prompt(self, rng: random.Random) -> list[str]:
        """Nothing but `<s>`."""
        return []

    def start(self, prompt: Sequence[str]) -> tuple:
        """State: the last five words."""
        return ()

    def following(self, state: tuple, position: int) -> Weights:
        """Words that may follow, with their weights."""
        rng = random.Random(" ".join(state))
        return {word: 2.718281828 ** (self.scale * rng.gauss(0, 1)) for word in self.words}

    def after(self, state: tuple, word: str, position: int) -> tuple:
        """The state that a word leads to."""
        return (*state, word)[-self.order :]

    def choice(self, completion: Sequence[str]) -> float:
        """Nothing is chosen here."""
        return 0.0


Task = Note | Brackets | Noise
TASKS: dict[str, Task] = {task.name: task for task in (Note(), Brackets(), Noise())}


def write(task: Task, prompt: Sequence[str], rng: random.Random) -> list[str]:
    """A text of the task, slips included."""
    state, text = task.start(prompt), []
    for position in range(task.length):
        weights = task.following(state, position)
        word = rng.choice(task.words) if rng.random() < SLIP else rng.choices([*weights], [*weights.values()])[0]
        state = task.after(state, word, position)
        text.append(word)
    return [*text, EOS]


def is_right(task: Task, prompt: Sequence[str], completion: Sequence[str]) -> bool:
    """Whether a text keeps to the rules from its first word to `</s>`."""
    if len(completion) != task.length + 1 or completion[-1] != EOS:
        return False
    state = task.start(prompt)
    for position, word in enumerate(completion[:-1]):
        if word not in task.following(state, position):
            return False
        state = task.after(state, word, position)
    return True


def ids_of(task: Task) -> dict[str, int]:
    """Ids of the words."""
    return SPECIAL | {word: len(SPECIAL) + index for index, word in enumerate(task.words)}


def make_tokenizer(task: Task) -> PreTrainedTokenizerFast:
    """One id per word."""
    backend = Tokenizer(WordLevel(ids_of(task), unk_token=PAD))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def make_prompts(task: Task, number: int, seed: int) -> list[list[str]]:
    """Prompts, drawn as the task has them."""
    rng = random.Random(f"{task.name} prompts {seed}")
    return [task.prompt(rng) for _ in range(number)]


def encode(task: Task, prompts: Sequence[Sequence[str]]) -> list[list[int]]:
    """Prompts as ids, `<s>` in front."""
    ids = ids_of(task)
    return [[ids[word] for word in (BOS, *prompt)] for prompt in prompts]


def as_rows(prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> Dataset:
    """Tokenised rows whose completion is trained."""
    rows = zip(prompts, completions, strict=True)
    columns = [(prompt + completion, [-100] * len(prompt) + completion) for prompt, completion in rows]
    return Dataset.from_dict(dict(zip(("input_ids", "labels"), map(list, zip(*columns, strict=True)), strict=True)))


def task_rows(task: Task, number: int, seed: int) -> Dataset:
    """Rows of the task itself."""
    prompts, ids, rng = make_prompts(task, number, seed), ids_of(task), random.Random(f"{task.name} texts {seed}")
    return as_rows(encode(task, prompts), [[ids[word] for word in write(task, prompt, rng)] for prompt in prompts])


def _common(task: Task) -> dict[str, Any]:
    ids = {"bos_token_id": SPECIAL[BOS], "eos_token_id": SPECIAL[EOS], "pad_token_id": SPECIAL[PAD]}
    return {"vocab_size": len(ids_of(task)), "max_position_embeddings": 32, "tie_word_embeddings": False, **ids}


def new_teacher(task: Task) -> PreTrainedModel:
    """A random Llama that sees the whole text."""
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=task.teacher_layers,
            num_attention_heads=4,
            **_common(task),
        )
    )


def new_student(task: Task) -> PreTrainedModel:
    """
    A random GPT-Neo of one layer whose attention sees the last `task.window` words.

    A Mistral has a window too, but no learned positions, without which a student that sees so little cannot know
    where a text ends.
    """
    return GPTNeoForCausalLM(
        GPTNeoConfig(
            hidden_size=32,
            intermediate_size=64,
            num_layers=1,
            num_heads=4,
            attention_types=[[["local"], 1]],
            window_size=task.window,
            **_common(task),
        )
    )
