"""What follows what in a row, where texts end, and which rows of a second text a step takes."""

from types import SimpleNamespace

import pytest
import torch

from tests.trainer.sparse import make_trainer, sparse_rows
from trl_kd.trainer.transitions import Course, select_states


EOS = torch.tensor([2])


def course(truncation, **options):
    """Two rows: a turn that ends without an EOS, the next one with one; and a text that was cut."""
    labels = torch.tensor([[-100, 5, 6, -100, -100, 7, 2, -100], [-100, -100, 8, 9, 4, -100, -100, -100]])
    inputs = {"labels": labels, "is_on_policy": torch.tensor([False, False])}
    selected = select_states(inputs, EOS)
    count = len(selected.labels)
    args = SimpleNamespace(truncation=truncation, train_eos=True, **options)
    return Course(selected.labels, selected.positions, selected.rows[:count], selected.ends, EOS, args), selected


def test_states_of_two_turns_and_a_cut_text():
    _, selected = course("drop")
    assert selected.labels.tolist() == [5, 6, 7, 2, 8, 9, 4]
    assert selected.positions.tolist() == [0, 1, 2, 3, 0, 1, 2]
    # After the cut text alone: what follows an inner turn is the user's
    assert selected.ends.tolist() == [6]
    assert selected.rows.tolist() == [0, 1, 4, 5, 9, 10, 11, 12]


@pytest.mark.parametrize(
    ("truncation", "has_next", "last"),
    [
        ("drop", [True, False, True, True, True, True, False], 0.0),
        ("bootstrap", [True, False, True, True, True, True, True], 80.0),
        ("terminal", [True] * 7, 0.0),
    ],
)
def test_no_value_crosses_from_a_turn_to_the_next(truncation, has_next, last):
    found, _ = course(truncation)
    assert found.follows.tolist() == [True, False, True, False, True, True, False]
    assert found.has_next.tolist() == has_next
    values = torch.arange(10.0, 90.0, 10.0)
    assert found.next_of(values).tolist() == [20.0, 0.0, 40.0, 0.0, 60.0, 70.0, last]


def test_returns_end_with_a_turn():
    found, _ = course("terminal", returns="monte_carlo", gamma=1.0)
    rewards = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0])
    returns = found.returns(rewards, torch.zeros(7))
    assert returns.tolist() == [3.0, 2.0, 12.0, 8.0, 112.0, 96.0, 64.0]


def test_short_step_leaves_no_row_of_the_second_text_out(tokenizer, tmp_path):
    """Ten rows in steps of eight: the second step of an epoch has two."""
    trainer = make_trainer(
        tokenizer,
        tmp_path,
        sparse_rows(10),
        preset="paper",
        per_device_train_batch_size=8,
        max_steps=4,
        options={"lm_dataset": sparse_rows(16)},
    )
    taken, index = [], trainer.second_text._index
    trainer.second_text._index = lambda place: taken.append(place) or index(place)
    trainer.train()
    assert taken == [*range(8), 8, 9, *range(16, 24), 24, 25]
    for batch in (range(16), range(16, 32)):  # each pass has every row once
        assert sorted(index(place) for place in batch) == list(range(16))
