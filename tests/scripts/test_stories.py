"""The grammar of the demonstration's stories, and the check of their sums."""

import random
import re

import pytest

from trl_kd.evaluation.metrics import text_values
from trl_kd.scripts.stories import (
    KINDS,
    NAMES,
    make_stories,
    make_story,
    right_numbers,
    sum_is_right,
    train_tokenizer,
)


# A prompt of each kind, the numbers that follow from it, worked out by hand, and a story that holds them
BY_HAND = {
    "count": (
        "Zoe has 3 white stamps. She finds 8 more at the market. Then she gives 7 to Ida. How many stamps does she "
        "have now?",
        [11, 4, 4],
        " With those that she finds there are 11. Zoe is happy. She keeps 4. The answer is 4.",
    ),
    "together, more": (
        "Eva has 12 apples. Ida has 8 more than Eva. How many apples do they have together?",
        [20, 32, 32],
        " Ida has 20. Eva is happy. They put all 32 on one table. The answer is 32.",
    ),
    "together, fewer": (
        "Eva has 12 apples. Ida has 8 fewer than Eva. How many apples do they have together?",
        [4, 16, 16],
        " Ida has 4. Eva is curious. They put all 16 on one table. The answer is 16.",
    ),
    "compare": (
        "Max counts 16 green marbles. Tom counts 2 of them at the market. Who has more, and how many more?",
        [14, 14],
        " Max has more marbles than Tom. Tom is curious. Tom needs 14 to catch up. The answer is 14.",
    ),
    "pack": (
        "Mia has 3 bags with 6 pencils in each. She loses 9 of them in the attic. How many pencils does she have now?",
        [18, 9, 9],
        " The bags hold 18 in all. Mia is tired. After the loss there are 9. The answer is 9.",
    ),
    "trip": (
        "Leo leaves at 5 to look for shells in the attic. The way takes 4 hours, and he stays for 1 hour. At what "
        "hour does he turn back?",
        [9, 10, 10],
        " He arrives at 9. Leo is curious. He looks around until 10. The answer is 10.",
    ),
}


def named(text):
    return {name for name in NAMES if name in text}


@pytest.mark.parametrize("kind", BY_HAND)
def test_right_numbers_prompt_by_hand_are_found(kind):
    prompt, numbers, _ = BY_HAND[kind]
    assert right_numbers(prompt) == numbers


@pytest.mark.parametrize("kind", BY_HAND)
def test_sum_is_right_any_wrong_number_is_found(kind):
    prompt, _, completion = BY_HAND[kind]
    assert sum_is_right(prompt, completion)
    places = list(re.finditer(r"\d+", completion))
    for place in places:
        for wrong in (int(place[0]) + 1, int(place[0]) - 1):
            assert not sum_is_right(prompt, f"{completion[: place.start()]}{wrong}{completion[place.end() :]}")
    assert not sum_is_right(prompt, completion.removesuffix("."))  # was cut off
    assert not sum_is_right(prompt, completion + " And 1 more.")
    assert not sum_is_right(prompt, completion[completion.index(" The answer") :])  # without its steps


@pytest.mark.parametrize("kind", KINDS)
def test_make_story_of_each_kind_is_right_by_its_own_check(kind):
    rng = random.Random(7)
    for _ in range(300):
        story = make_story(rng, kind)
        assert set(story) == {"prompt", "completion"}
        assert sum_is_right(**story), story
        assert story["completion"].startswith(" ")
        if kind not in ("pack", "trip"):  # there, someone may come by
            assert named(story["completion"]) <= named(story["prompt"])


def test_make_stories_has_all_kinds_and_few_repetitions():
    stories = make_stories(2000, seed=5)
    assert stories.column_names == ["prompt", "completion"]
    assert len(set(stories["prompt"])) > 1900
    assert len({len(right_numbers(prompt)) for prompt in stories["prompt"]}) == 2
    assert make_stories(50, seed=5).to_list() == stories.select(range(50)).to_list()
    assert make_stories(50, seed=6).to_list() != stories.select(range(50)).to_list()


def test_exact_match_reads_the_answer_of_a_story():
    stories = make_stories(100, seed=1)
    references = [[completion] for completion in stories["completion"]]
    assert text_values("exact_match", stories["completion"], references) == [100.0] * 100
    wrong = [
        re.sub(r"The answer is (\d+)\.$", "The answer is 99.", completion) for completion in stories["completion"]
    ]
    assert text_values("exact_match", wrong, references) == [0.0] * 100


@pytest.mark.parametrize("prompt", ["", "Once upon a time there were 3 apples.", "Mia has 3"])
def test_sum_is_right_foreign_prompt_is_not(prompt):
    assert right_numbers(prompt) == []
    assert not sum_is_right(prompt, " The answer is 3.")


def test_train_tokenizer_is_lossless_and_has_a_token_for_each_number():
    tokenizer = train_tokenizer(count=1500)
    story = make_story(random.Random(9))
    text = story["prompt"] + story["completion"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.decode(tokenizer("Über 100 €")["input_ids"]) == "Über 100 €"
    # A prompt and its completion are tokenised alike apart and together
    parts = [tokenizer(story[part])["input_ids"] for part in ("prompt", "completion")]
    assert sum(parts, []) == tokenizer(text)["input_ids"]
    for number in range(1, 33):
        assert len(tokenizer(f" {number}")["input_ids"]) == 1, number
