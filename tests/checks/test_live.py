"""What models say of a run, from figures worked out by hand."""

import math

import pytest
import torch

from trl_kd.checks.live import (
    RowLikelihoods,
    Written,
    in_words,
    likelihood_finding,
    rollout_finding,
    time_finding,
    token_nll,
)
from trl_kd.modules import LMHead


# Likelihood


def test_token_nll_is_that_of_the_softmax():
    # Logits (0, ln 3): probabilities 1/4 and 3/4
    head = LMHead(torch.tensor([[0.0], [math.log(3.0)]]))
    found = token_nll(torch.ones(2, 1), head, torch.tensor([0, 1]))
    assert found.tolist() == pytest.approx([math.log(4.0), math.log(4.0 / 3.0)])


def rows(*pairs):
    return RowLikelihoods(*(list(part) for part in zip(*pairs, strict=True)))


def test_likelihood_teacher_better_is_fine_with_the_gap_and_its_error():
    student, teacher = rows((4.0, 2), (6.0, 2)), rows((1.0, 2), (2.0, 2))
    finding = likelihood_finding(student, teacher)
    assert finding.verdict == "fine" and finding.fix == ""
    # 10 / 4 - 3 / 4. Rows differ by 1.5 and 2 nats a token: 0.25 either side, over 2 rows: 0.25
    assert finding.values["gap"] == pytest.approx(1.75)
    assert finding.values["standard_error"] == pytest.approx(0.25)
    assert finding.values["student_nats"] == 2.5 and finding.values["teacher_nats"] == 0.75
    assert "0.750 nats per token, the student 2.500: the teacher is better by 1.750 ± 0.250" in finding.text


def test_likelihood_standard_error_is_that_of_a_ratio_of_sums():
    """Rows of different length, against many draws of rows with replacement."""
    generator = torch.Generator().manual_seed(0)
    units = torch.randint(2, 40, (300,), generator=generator).double()
    hard = torch.rand(300, generator=generator, dtype=torch.float64)
    student, teacher = units * (2 + hard), units * (1 + 2 * hard)
    found = likelihood_finding(
        RowLikelihoods(student.tolist(), units.tolist()), RowLikelihoods(teacher.tolist(), units.tolist())
    )
    draws = torch.randint(300, (4000, 300), generator=generator)
    gaps = (student[draws].sum(1) - teacher[draws].sum(1)) / units[draws].sum(1)
    # A standard deviation of 4000 draws is right within 1.1 %
    assert found.values["standard_error"] == pytest.approx(gaps.std().item(), rel=0.05)


def test_likelihood_teacher_worse_stops_with_what_to_look_at():
    student, teacher = rows((1.0, 2), (2.0, 2)), rows((4.0, 2), (6.0, 2))
    finding = likelihood_finding(student, teacher)
    assert finding.verdict == "stop" and "the teacher is worse, by 1.750 ± 0.250" in finding.text
    for word in ("chat template", "tokenizer", "quantisation", "`teacher_model_name_or_path`"):
        assert word in finding.fix


@pytest.mark.parametrize(
    ("shift", "verdict"), [(0.45, "careful"), (-0.45, "careful"), (0.55, "fine"), (-0.55, "stop")]
)
def test_likelihood_difference_counts_beyond_two_standard_errors(shift, verdict):
    # Gaps of the rows: shift ± 0.25, so that the standard error is 0.25 exactly
    student = rows((2.0 + shift - 0.25, 1), (2.0 + shift + 0.25, 1))
    finding = likelihood_finding(student, rows((2.0, 1), (2.0, 1)))
    assert finding.values["standard_error"] == pytest.approx(0.25)
    assert finding.verdict == verdict


def test_likelihood_of_one_model_says_so():
    both = rows((1.0, 2), (2.0, 2))
    finding = likelihood_finding(both, both)
    assert finding.verdict == "careful" and "they are one model" in finding.text
    assert "`teacher_system_prompt`" in finding.fix


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_likelihood_that_is_not_finite_stops(side):
    parts = {"student": rows((4.0, 2), (6.0, 2)), "teacher": rows((1.0, 2), (2.0, 2))}
    finding = likelihood_finding(**(parts | {side: rows((math.nan, 2), (2.0, 2))}))
    assert finding.verdict == "stop" and f"The {side}'s likelihoods are not finite" in finding.text
    assert "bfloat16" in finding.fix


def test_likelihood_of_a_single_row_is_careful():
    finding = likelihood_finding(rows((9.0, 2)), rows((1.0, 2)))
    assert finding.verdict == "careful" and "`samples`" in finding.fix


def test_likelihood_teacher_that_only_guesses_is_careful():
    student, teacher = rows((14.0, 2), (14.4, 2)), rows((13.0, 2), (13.2, 2))
    guessing = likelihood_finding(student, teacher, vocab_size=1000)  # ln 1000 = 6.908; the teacher 6.55
    assert guessing.verdict == "careful" and "a guess among 1000 tokens needs 6.908" in guessing.text
    assert likelihood_finding(student, teacher, vocab_size=2000).verdict == "fine"  # ln 2000 = 7.6
    assert likelihood_finding(student, teacher, vocab_size=1000, unit="byte").verdict == "fine"


def test_likelihood_says_what_it_was_measured_on():
    student, teacher = rows((4.0, 2), (6.0, 2)), rows((1.0, 2), (2.0, 2))
    finding = likelihood_finding(student, teacher, unit="byte", written_by_teacher=True)
    assert "nats per byte" in finding.text and "The teacher wrote them itself" in finding.text
    finding = likelihood_finding(student, teacher, known=0.62, name="likelihood: big")
    assert finding.name == "likelihood: big" and "on the 62% of tokens that the cache knows" in finding.text


# Rollouts

END = 2
GOOD = Written([[5, 6, 7, END], [8, 9, END]], [END])
LIMITS = {"max_completion_length": 6, "lmbda": 0.5}


def test_written_figures_by_hand():
    # 8 4-grams of which (1, 1, 1, 1) is seen 5 times: one row of 8 ones has 5 4-grams, 1 of them new
    written = Written([[1] * 8, [1, 2, 3, 4, 5], [END], [4, END]], [END])
    assert written.length == 4.0
    assert written.eos_rate == 0.5
    assert written.empty_share == 0.25
    assert written.repeated_share == pytest.approx((4 / 5 + 0.0) / 2)
    assert Written([[1, 2]], [END]).repeated_share == 0.0


def test_rollouts_that_end_are_fine():
    finding = rollout_finding(GOOD, GOOD, **LIMITS, sample="hello")
    assert finding.verdict == "fine" and finding.fix == "" and finding.sample == "hello"
    assert "Of 2 completions of the student, 100% end within `max_completion_length` (6)" in finding.text
    assert finding.values["student"]["length"] == 3.5


def test_rollouts_of_nobody_are_fine():
    assert rollout_finding(None, None, **LIMITS).text == "Nobody writes completions in this run."


ENDLESS = Written([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]], [END])


@pytest.mark.parametrize(("lmbda", "verdict"), [(0.5, "careful"), (1.0, "stop")])
def test_rollouts_without_an_end_stop_a_run_on_rollouts_alone(lmbda, verdict):
    finding = rollout_finding(ENDLESS, GOOD, max_completion_length=6, lmbda=lmbda)
    assert finding.verdict == verdict and "does not know how to stop" in finding.text
    assert "`trl sft`" in finding.fix and "chat template" in finding.fix


def test_rollouts_without_an_end_on_both_sides_ask_for_longer_ones():
    finding = rollout_finding(ENDLESS, ENDLESS, **LIMITS)
    assert finding.verdict == "careful" and "Raise `max_completion_length` (now 6)" in finding.fix
    assert "Not one of the student's" in finding.text and "Not one of the teacher's" in finding.text


@pytest.mark.parametrize(
    ("completions", "said", "fix"),
    [
        ([[END], [END], [5, END]], "end at once", "Check that the prompts end where"),
        ([[5, END], [5, 6, 7, 8, 9, 10], [7, 8, 9, 10, 11, 12]], "are cut off", "Raise `max_completion_length`"),
        ([[5] * 8 + [END]] * 3, "run in circles", "`temperature=1.0`"),
    ],
)
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_rollouts_with_a_fault_are_careful(who, completions, said, fix):
    other = None if who == "student" else GOOD  # beside a teacher that ends, a longer limit is no help
    written = {"student": other, "teacher": other} | {who: Written(completions, [END])}
    finding = rollout_finding(written["student"], written["teacher"], **LIMITS)
    assert finding.verdict == "careful" and said in finding.text and fix in finding.fix
    assert f"{who}'s" in finding.text


def test_rollouts_of_a_student_cut_off_where_the_teachers_end_ask_for_training():
    student = Written([[5, END], [5, 6, 7, 8, 9, 10], [7, 8, 9, 10, 11, 12]], [END])
    finding = rollout_finding(student, GOOD, **LIMITS)
    assert finding.verdict == "careful" and "has yet to learn to stop" in finding.text
    assert "`trl sft`" in finding.fix and "Raise" not in finding.fix


# Time


def test_time_of_a_run_is_steps_times_seconds():
    finding = time_finding({"rollouts": 1.5, "forward and backward": 0.5}, 1800, measured=2, of=8, device="a card")
    assert finding.verdict == "fine"
    assert finding.values["seconds_per_step"] == 2.0 and finding.values["seconds"] == 3600.0
    assert "takes about 2 s on a card (rollouts 1.5 s, forward and backward 0.5 s), from 2 of its 8" in finding.text
    assert "the 1800 steps of the run take about 60 minutes" in finding.text


def test_time_beyond_a_day_is_careful_and_names_the_slow_part():
    seconds = {"rollouts": 50.0, "forward and backward": 10.0}
    assert time_finding(seconds, 1440).verdict == "fine"  # a day exactly
    finding = time_finding(seconds, 1441)
    assert finding.verdict == "careful" and "`use_vllm`" in finding.fix and "`max_steps`" in finding.fix
    other = time_finding({"rollouts": 10.0, "forward and backward": 50.0}, 1441)
    assert other.verdict == "careful" and "`use_vllm`" not in other.fix


def test_time_without_a_number_of_steps_says_so():
    finding = time_finding({"forward and backward": 1.0}, None)
    assert finding.verdict == "fine" and "How many steps the run has is not known" in finding.text


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0123, "0.012 s"),
        (9.96, "10 s"),
        (61.0, "61 s"),
        (150.0, "2 minutes"),
        (7200.0, "2.0 hours"),
        (100_000.0, "27.8 hours"),
        (3 * 86_400.0, "3.0 days"),
    ],
)
def test_in_words_is_how_people_say_it(seconds, words):
    assert in_words(seconds) == words
