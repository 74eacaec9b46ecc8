import pytest
import torch
from datasets import Dataset

from tests.tiny import make_model
from trl_kd.data import KDCollator, pack, rows_of


def row(input_ids, labels, prompt_length=1, is_on_policy=False):
    return {"input_ids": input_ids, "labels": labels, "prompt_length": prompt_length, "is_on_policy": is_on_policy}


ROWS = [
    row([5, 6, 7], [-100, 6, 7]),
    # Pad and EOS (0) inside a row, and an untrained end.
    row([8, 0, 9, 0, 4], [-100, -100, 9, 0, -100], prompt_length=2, is_on_policy=True),
    row([3, 0], [-100, -100], prompt_length=2),
]


def test_collator_rows_of_different_length_are_padded_on_the_right():
    batch = KDCollator(pad_token_id=0)(ROWS)
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[5, 6, 7, 0, 0], [8, 0, 9, 0, 4], [3, 0, 0, 0, 0]],
        "attention_mask": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]],
        "labels": [[-100, 6, 7, -100, -100], [-100, -100, 9, 0, -100], [-100] * 5],
        "prompt_length": [1, 2, 2],
        "is_on_policy": [False, True, False],
    }
    integers = ("input_ids", "attention_mask", "labels", "prompt_length")
    assert all(batch[name].dtype == torch.long for name in integers)
    assert batch["is_on_policy"].dtype == torch.bool


def test_collator_missing_and_unknown_columns_get_defaults_and_are_ignored():
    batch = KDCollator(pad_token_id=0)([{"input_ids": [1, 2], "labels": [1, 2], "text": "a", "score": 0.5}])
    assert set(batch) == {"input_ids", "attention_mask", "labels", "prompt_length", "is_on_policy"}
    assert batch["prompt_length"].tolist() == [0] and batch["is_on_policy"].tolist() == [False]


@pytest.mark.parametrize(("multiple", "length"), [(None, 5), (1, 5), (4, 8), (5, 5), (8, 8)])
def test_collator_pad_to_multiple_of_rounds_the_length_up(multiple, length):
    batch = KDCollator(pad_token_id=9, pad_to_multiple_of=multiple)(ROWS)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (3, length)
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 5, 2]
    assert batch["input_ids"][0].tolist() == [5, 6, 7] + [9] * (length - 3)


@pytest.mark.parametrize("multiple", [None, 8])
def test_rows_of_collated_rows_are_the_rows(multiple):
    rows = rows_of(KDCollator(pad_token_id=0, pad_to_multiple_of=multiple)(ROWS))
    assert rows == ROWS
    assert all(type(row["prompt_length"]) is int and type(row["is_on_policy"]) is bool for row in rows)


def test_rows_of_packed_batch_raises():
    batch = KDCollator(pad_token_id=0)([{"input_ids": [1, 2], "labels": [1, 2], "seq_lengths": [2]}])
    with pytest.raises(ValueError, match="no `attention_mask`, so it is packed.*Set `packing=False`"):
        rows_of(batch)


PACKED = [
    {"input_ids": [5, 6, 7, 8, 9], "labels": [5, 6, 7, 8, 9], "seq_lengths": [3, 2]},
    {"input_ids": [4, 3, 2], "labels": [-100, 3, 2], "seq_lengths": [1, 2]},
]


def test_collator_packed_rows_become_one_row_with_restarting_positions():
    batch = KDCollator(pad_token_id=0)(PACKED)
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 9, 4, 3, 2]],
        "position_ids": [[0, 1, 2, 0, 1, 0, 0, 1]],
        "labels": [[-100, 6, 7, -100, 9, -100, -100, 2]],
        "prompt_length": [0],
        "is_on_policy": [False],
    }


def test_collator_packed_padding_is_an_untrained_sequence_of_its_own():
    batch = KDCollator(pad_token_id=0, pad_to_multiple_of=6)(PACKED)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 4, 3, 2, 0, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 0, 1, 0, 1, 2, 3]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9, -100, -100, 2, -100, -100, -100, -100]]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_collator_packed_row_has_the_hidden_states_of_its_sequences(kind, attention):
    model = make_model(kind, vocab_size=50)
    model.set_attn_implementation(attention)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (7, 4, 9, 1, 3):
        input_ids = torch.randint(50, (length,), generator=generator).tolist()
        rows.append(row(input_ids, input_ids))
    packed = pack(Dataset.from_list(rows), max_length=12)
    assert sorted(packed["seq_lengths"]) == [[7, 4, 1], [9, 3]]  # best fit, longest first
    batch = KDCollator(pad_token_id=0, pad_to_multiple_of=16)(list(packed))
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    with torch.no_grad():
        # With a cache, Transformers doesn't look for sequences and lets them see each other.
        hidden_states = model.base_model(**inputs, use_cache=False).last_hidden_state[0]  # (S, H)
        start = 0
        for packed_row in packed:
            for length in packed_row["seq_lengths"]:
                alone = model.base_model(batch["input_ids"][:, start : start + length]).last_hidden_state[0]
                # Float32 rounding of another order of summation; a neighbour that leaks in moves states by 3.
                torch.testing.assert_close(hidden_states[start : start + length], alone, atol=2e-5, rtol=1e-4)
                start += length
    assert start == 24
