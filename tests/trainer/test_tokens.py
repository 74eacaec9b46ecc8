import pytest
import torch

from trl_kd.data import KDCollator
from trl_kd.losses import weighted_sum
from trl_kd.trainer.tokens import count_tokens, select_tokens, token_weights


def batch(*rows):
    """Rows of (labels, is_on_policy); input ids are of no interest here, but never equal to the labels."""
    return KDCollator(pad_token_id=0)(
        [
            {"input_ids": [7] * len(labels), "labels": labels, "prompt_length": 1, "is_on_policy": on_policy}
            for labels, on_policy in rows
        ]
    )


THREE_ROWS = (([-100, 11, 12, 13], False), ([-100, -100, 21], True), ([-100, 31, -100, 33, 34], False))


def test_select_tokens_labels_are_shifted_to_the_positions_that_predict_them():
    selected = select_tokens(batch(*THREE_ROWS))
    # Five columns after padding; positions 0 to 2 of the first row, 1 of the second, 0, 2 and 3 of the third
    assert selected.rows.tolist() == [0, 1, 2, 5 + 1, 10 + 0, 10 + 2, 10 + 3]
    assert selected.labels.tolist() == [11, 12, 13, 21, 31, 33, 34]
    assert selected.is_on_policy.tolist() == [False, False, False, True, False, False, False]
    # Trained tokens before each in its row: the untrained one between 31 and 33 is not counted
    assert selected.positions.tolist() == [0, 1, 2, 0, 0, 1, 2]


def test_select_tokens_logits_of_a_perfect_model_predict_the_labels():
    rows = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    labels = rows.clone()
    labels[0, :2] = -100
    selected = select_tokens({"labels": labels, "is_on_policy": torch.tensor([False, True])})
    logits = torch.nn.functional.one_hot(rows.roll(-1, dims=1), 10)  # at position i, certain of token i + 1
    assert torch.equal(selected.of(logits).argmax(-1), selected.labels)


def test_select_tokens_first_token_of_a_row_is_not_predicted():
    selected = select_tokens(batch(([5, 6, 7], False)))
    assert selected.labels.tolist() == [6, 7] and selected.positions.tolist() == [0, 1]


def test_select_tokens_nothing_trained_is_empty():
    selected = select_tokens(batch(([-100, -100], False), ([-100, -100, -100], True)))
    assert len(selected.rows) == len(selected.labels) == len(selected.is_on_policy) == len(selected.positions) == 0


def test_select_tokens_packed_row_counts_positions_within_each_sequence():
    rows = [
        {"input_ids": [1] * 6, "labels": [10, 11, 12, -100, -100, 15], "seq_lengths": [3, 3]},
        {"input_ids": [1] * 5, "labels": [20, 21, -100, 23, 24], "seq_lengths": [1, 4]},
    ]
    packed = KDCollator(pad_token_id=0, pad_to_multiple_of=16)(rows)
    selected = select_tokens(packed)
    # 10, 20 and 21 begin a sequence, so nothing predicts them
    assert selected.labels.tolist() == [11, 12, 15, 23, 24]
    assert selected.positions.tolist() == [0, 1, 0, 0, 1]
    assert not selected.is_on_policy.any()


def test_select_tokens_packed_row_equals_its_sequences_one_by_one():
    generator = torch.Generator().manual_seed(0)
    labels = [torch.randint(1, 50, (n,), generator=generator).tolist() for n in (4, 1, 6, 2, 3)]
    labels[2][3] = -100
    packed = KDCollator(pad_token_id=0)(
        [{"input_ids": sum(labels, []), "labels": sum(labels, []), "seq_lengths": [len(each) for each in labels]}]
    )
    together = select_tokens(packed)
    alone = [select_tokens(batch((each, False))) for each in labels]
    assert together.labels.tolist() == [label for each in alone for label in each.labels.tolist()]
    assert together.positions.tolist() == [position for each in alone for position in each.positions.tolist()]


def test_count_tokens_counts_what_is_selected_by_source():
    inputs = batch(*THREE_ROWS)
    assert count_tokens(inputs).tolist() == [6, 1]
    is_on_policy = select_tokens(inputs).is_on_policy
    assert count_tokens(inputs).tolist() == [(~is_on_policy).sum().item(), is_on_policy.sum().item()]


@pytest.mark.parametrize(("on_policy", "expected"), [(False, [2, 0]), (True, [0, 2])])
def test_count_tokens_one_source_absent_is_zero(on_policy, expected):
    # The label of the first token is not counted: nothing predicts it
    assert count_tokens(batch(([5, 6, 7], on_policy))).tolist() == expected


def test_token_weights_literal_counts_have_the_values_by_hand():
    is_on_policy = torch.tensor([False, False, True, False, True])
    weights, own = token_weights(is_on_policy, torch.tensor([8, 4]), 0.25)
    torch.testing.assert_close(weights, torch.tensor([0.75 / 8, 0.75 / 8, 0.25 / 4, 0.75 / 8, 0.25 / 4]))
    torch.testing.assert_close(own, torch.tensor([1 / 8, 1 / 8, 1 / 4, 1 / 8, 1 / 4]))


def test_token_weights_mix_the_means_of_the_sources():
    is_on_policy = torch.tensor([False] * 3 + [True] * 5)
    values = torch.tensor([1.0, 2.0, 6.0, 10.0, 20.0, 30.0, 40.0, 50.0])
    weights, own = token_weights(is_on_policy, torch.tensor([3, 5]), 0.2)
    assert weighted_sum(values, weights).item() == pytest.approx(0.8 * 3.0 + 0.2 * 30.0)
    assert weighted_sum(values, own).item() == pytest.approx(3.0 + 30.0)


@pytest.mark.parametrize("on_policy_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("source", [False, True])
def test_token_weights_one_source_absent_gives_its_share_to_the_other(source, on_policy_weight):
    counts = torch.tensor([0, 4] if source else [4, 0])
    weights, own = token_weights(torch.full((4,), source), counts, on_policy_weight)
    assert weights.tolist() == own.tolist() == [0.25] * 4


@pytest.mark.parametrize(("on_policy_weight", "expected"), [(0.0, [0.5, 0.5, 0.0]), (1.0, [0.0, 0.0, 1.0])])
def test_token_weights_all_of_one_source_leaves_none_for_the_other(on_policy_weight, expected):
    weights, _ = token_weights(torch.tensor([False, False, True]), torch.tensor([2, 1]), on_policy_weight)
    assert weights.tolist() == expected


def test_token_weights_splits_of_a_step_have_the_weights_of_the_whole():
    is_on_policy = torch.tensor([False, True, True, False, False, True, True])
    counts = torch.tensor([3, 4])
    whole = token_weights(is_on_policy, counts, 0.5)
    for size in (1, 2, 3):
        parts = [token_weights(part, counts, 0.5) for part in is_on_policy.split(size)]
        for weights, pieces in zip(whole, zip(*parts, strict=True), strict=True):
            assert torch.equal(weights, torch.cat(pieces))


def test_token_weights_no_tokens_at_all_are_finite():
    weights, own = token_weights(torch.zeros(0, dtype=torch.bool), torch.tensor([0, 0]), 0.5)
    assert weights.shape == own.shape == (0,)
    weights, own = token_weights(torch.tensor([False, True]), torch.tensor([0, 0]), 0.5)
    assert torch.isfinite(weights).all() and torch.isfinite(own).all()
