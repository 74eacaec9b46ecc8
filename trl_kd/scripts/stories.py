"""
A small grammar of stories with sums in them, which the demonstration and the bench are made of.

The prompt tells what happened and asks for a number; the completion tells the story to its end, with the steps of the
sum and then its result. There are five kinds of story. What the completion says besides its numbers is free, with
weights that depend on the prompt, so that a distribution is to be learned and not one text; no free sentence holds a
digit, so that a program can check a story by its numbers.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast


NAMES = {"Mia": "she", "Ben": "he", "Zoe": "she", "Tom": "he", "Ida": "she", "Max": "he", "Eva": "she", "Leo": "he"}
THINGS = ("marbles", "apples", "stamps", "shells", "pencils", "buttons")
COLOURS = ("red", "blue", "green", "white", "yellow")
# The place of an index is where the thing of that index is usually found
PLACES = ("near the old well", "under the tree", "at the market", "on the beach", "behind the school", "in the attic")
MOODS = {
    "gain": ("happy", "proud", "full of plans", "too excited to sleep"),
    "loss": ("a little sad", "tired", "not sorry at all", "glad to help"),
    "even": ("curious", "quite sure", "in a hurry", "in no hurry"),
}
VOCAB_SIZE = 768


@dataclass(frozen=True)
class Plot:
    """What is settled before a story is told: its prompt, the sentences of its sum, the result, and how it ends."""

    prompt: str
    steps: tuple[str, ...]
    answer: int
    mood: str


@dataclass(frozen=True)
class Cast:
    """Who and what a story is about."""

    rng: random.Random
    name: str
    friend: str
    thing: str

    @property
    def pronoun(self) -> str:
        """Of the first child."""
        return NAMES[self.name]

    def place(self) -> str:
        """Mostly where the thing usually is."""
        usual = THINGS.index(self.thing)
        return self.rng.choices(PLACES, weights=[6 if index == usual else 1 for index in range(len(PLACES))])[0]


def _count(cast: Cast) -> Plot:
    """Finds some and gives some away."""
    rng, she, thing = cast.rng, cast.pronoun, cast.thing
    first, found = rng.randint(2, 15), rng.randint(1, 9)
    total = first + found
    given = rng.randint(1, total - 1)
    colour = rng.choice(COLOURS)
    return Plot(
        f"{cast.name} has {first} {colour} {thing}. {cap(she)} finds {found} more {cast.place()}. "
        f"Then {she} gives {given} to {cast.friend}. How many {thing} does {she} have now?",
        (f"With those that {she} finds there are {total}.", f"{cap(she)} keeps {total - given}."),
        total - given,
        "gain" if given < found else "loss",
    )


def _together(cast: Cast) -> Plot:
    """How many two children have, of whom one has some more or fewer."""
    rng, thing = cast.rng, cast.thing
    is_more = rng.random() < 0.5
    first, change = rng.randint(3, 12), rng.randint(1, 8)
    change = change if is_more else min(change, first - 1)
    second = first + change if is_more else first - change
    return Plot(
        f"{cast.name} has {first} {thing}. {cast.friend} has {change} {'more' if is_more else 'fewer'} than "
        f"{cast.name}. How many {thing} do they have together?",
        (f"{cast.friend} has {second}.", f"They put all {first + second} on one table."),
        first + second,
        "gain" if is_more else "even",
    )


def _compare(cast: Cast) -> Plot:
    """Who has more, and how many more."""
    rng, thing = cast.rng, cast.thing
    first, second = rng.sample(range(1, 25), 2)
    colour = rng.choice(COLOURS)
    winner, loser = (cast.name, cast.friend) if first > second else (cast.friend, cast.name)
    return Plot(
        f"{cast.name} counts {first} {colour} {thing}. {cast.friend} counts {second} of them {cast.place()}. "
        f"Who has more, and how many more?",
        (f"{winner} has more {thing} than {loser}.", f"{loser} needs {abs(first - second)} to catch up."),
        abs(first - second),
        "even",
    )


def _pack(cast: Cast) -> Plot:
    """Bags with as many in each, less some."""
    rng, she, thing = cast.rng, cast.pronoun, cast.thing
    bags, each = rng.randint(2, 6), rng.randint(2, 6)
    total = bags * each
    lost = rng.randint(1, min(9, total - 1))
    return Plot(
        f"{cast.name} has {bags} bags with {each} {thing} in each. {cap(she)} loses {lost} of them {cast.place()}. "
        f"How many {thing} does {she} have now?",
        (f"The bags hold {total} in all.", f"After the loss there are {total - lost}."),
        total - lost,
        "loss",
    )


def _trip(cast: Cast) -> Plot:
    """A way and a stay, on the clock."""
    rng, she = cast.rng, cast.pronoun
    start, way, stay = rng.randint(1, 12), rng.randint(1, 5), rng.randint(1, 7)
    place = cast.place()
    return Plot(
        f"{cast.name} leaves at {start} to look for {cast.thing} {place}. The way takes {hours(way)}, and {she} stays "
        f"for {hours(stay)}. At what hour does {she} turn back?",
        (f"{cap(she)} arrives at {start + way}.", f"{cap(she)} looks around until {start + way + stay}."),
        start + way + stay,
        "even",
    )


KINDS: dict[str, Callable[[Cast], Plot]] = {
    "count": _count,
    "together": _together,
    "compare": _compare,
    "pack": _pack,
    "trip": _trip,
}
"""Kinds of story, by name."""


def cap(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def hours(number: int) -> str:
    """A duration."""
    return f"{number} hour{'' if number == 1 else 's'}"


def _free_sentence(cast: Cast, mood: str) -> str:
    """What happens beside the sum."""
    rng, she = cast.rng, cast.pronoun
    feeling = rng.choices(MOODS[mood], weights=(6, 3, 2, 1))[0]
    sentence = rng.choices(
        (
            f"{cast.name} is {feeling}.",
            f"{cast.friend} is {feeling} and says so.",
            f"{cap(she)} thinks of the {rng.choice(COLOURS)} {cast.thing} {cast.place()}.",
            f"{cast.friend} laughs, and {cast.name} counts again.",
        ),
        weights=(5, 3, 2, 2),
    )[0]
    return sentence


def make_story(rng: random.Random, kind: str | None = None) -> dict[str, str]:
    """
    One story.

    Args:
        rng (`random.Random`):
            Source of all choices.
        kind (`str`, *optional*):
            One of [`KINDS`]; drawn if not given.

    Returns:
        `dict[str, str]`: `prompt` and `completion`; the completion begins with a space and ends with the result.
    """
    kind = rng.choice(list(KINDS)) if kind is None else kind
    cast = Cast(rng, *rng.sample(list(NAMES), 2), thing=rng.choice(THINGS))
    plot = KINDS[kind](cast)
    first, second = plot.steps
    sentences = [first, _free_sentence(cast, plot.mood), second]
    if rng.random() < 0.3:
        sentences.insert(0, rng.choices(("Let us see.", "That is easy.", "Wait a moment."), weights=(3, 2, 1))[0])
    sentences.append(f"The answer is {plot.answer}.")
    return {"prompt": plot.prompt, "completion": "".join(f" {sentence}" for sentence in sentences)}


def make_stories(count: int, seed: int, kind: str | None = None) -> "Dataset":
    """
    Dataset of stories.

    Args:
        count (`int`):
            Number of rows.
        seed (`int`):
            Seed of all of them.
        kind (`str`, *optional*):
            One of [`KINDS`]; drawn for each row if not given.

    Returns:
        [`~datasets.Dataset`]: with the columns `prompt` and `completion`.
    """
    from datasets import Dataset

    rng = random.Random(seed)
    return Dataset.from_list([make_story(rng, kind) for _ in range(count)])


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _together_numbers(prompt: str) -> list[int]:
    first, change = _numbers(prompt)
    second = first + change if " more than " in prompt else first - change
    return [second, first + second, first + second]


def _count_numbers(prompt: str) -> list[int]:
    first, found, given = _numbers(prompt)
    return [first + found, first + found - given, first + found - given]


def _pack_numbers(prompt: str) -> list[int]:
    bags, each, lost = _numbers(prompt)
    return [bags * each, bags * each - lost, bags * each - lost]


def _trip_numbers(prompt: str) -> list[int]:
    start, way, stay = _numbers(prompt)
    return [start + way, start + way + stay, start + way + stay]


def _compare_numbers(prompt: str) -> list[int]:
    first, second = _numbers(prompt)
    return [abs(first - second)] * 2


# What a prompt of each kind says, and the numbers that its story must then hold. Worked out from the text alone, apart
# from the code above that writes it, so that one checks the other.
_SUMS = {
    r"has \d+ \w+ \w+\. \w+ finds \d+ more ": _count_numbers,
    r" do they have together\?$": _together_numbers,
    r"Who has more, and how many more\?$": _compare_numbers,
    r"has \d+ bags with \d+ ": _pack_numbers,
    r"leaves at \d+ to look ": _trip_numbers,
}


def right_numbers(prompt: str) -> list[int]:
    """
    The numbers that a story with this prompt must hold, in their order; the last one is the result.

    Args:
        prompt (`str`):
            First part of a story of this grammar.

    Returns:
        `list[int]`: steps of the sum and its result; empty if the prompt is none of this grammar.
    """
    for pattern, numbers in _SUMS.items():
        if re.search(pattern, prompt):
            return numbers(prompt)
    return []


def sum_is_right(prompt: str, completion: str) -> bool:
    """
    Whether a completion tells all steps of its sum, gets each of them right, and comes to its end.

    Args:
        prompt (`str`):
            First part of a story.
        completion (`str`):
            What a model makes of it, without special tokens.

    Returns:
        `bool`
    """
    numbers = right_numbers(prompt)
    return bool(numbers) and _numbers(completion) == numbers and completion.endswith(f"The answer is {numbers[-1]}.")


def train_tokenizer(count: int = 4000, seed: int = 0) -> "PreTrainedTokenizerFast":
    """
    Byte-level BPE on stories: every text can be written with it, and each number of the grammar is one token.

    Args:
        count (`int`, *optional*, defaults to `4000`):
            Stories to learn it from.
        seed (`int`, *optional*, defaults to `0`):
            Their seed.

    Returns:
        [`~transformers.PreTrainedTokenizerFast`]: without BOS; padding `<pad>`, end of a story `<eos>`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(seed)
    stories = (make_story(rng) for _ in range(count))
    tokenizer.train_from_iterator((story["prompt"] + story["completion"] for story in stories), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
