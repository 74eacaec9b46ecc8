"""The bytes of the teacher's tokens: nothing is lost but what is stated, and no more bytes than promised."""

import re
import struct

import numpy as np
import pytest

from tests.references.packing import decode_row
from trl_kd.teachers.packing import pack_row, unpack_row


QWEN = 151_936


def random_row(counts: list[int], vocab_size: int, seed: int = 0, spread: float = 2.0) -> tuple[np.ndarray, ...]:
    """Random different ids, and log-probabilities of parts of a distribution, in no order."""
    rng = np.random.default_rng(seed)
    ids = np.concatenate([rng.choice(vocab_size, count, replace=False) for count in counts])
    log_probs = []
    for count in counts:
        logits = spread * rng.standard_normal(count + 1)  # the last one is what is outside of the set
        log_probs.append((logits - np.log(np.exp(logits).sum()))[:count])
    return np.array(counts), ids, np.concatenate(log_probs)


def by_id(counts: np.ndarray, ids: np.ndarray, log_probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probabilities in the order of ids of each state."""
    order = np.lexsort((ids, np.repeat(np.arange(len(counts)), counts)))
    return ids[order], log_probs[order]


MIXED = [1, 2, 5, 1, 37, 128, 1, 3]


def test_pack_row_single_token_is_the_bytes_worked_out_by_hand():
    # -ln(0.9) = 0.10536 lies between two halves 2^-14 apart; the upper one is 1727 * 2^-14.
    # Low parts have floor(log2(10 ln 2)) = 2 bits: 7 = 1 * 4 + 3. One zero and a one in unary, lowest bit first: 2.
    tail = struct.pack("<e", 1727 / 2**14)
    assert pack_row(np.array([1]), np.array([7]), np.log([0.9]), vocab_size=10, bits=8) == b"\1\0" + tail + b"\3\2"


@pytest.mark.parametrize("bits", [4, 6, 8, 11, 16, 32])
@pytest.mark.parametrize(("counts", "vocab_size"), [(MIXED, QWEN), ([3, 1, 300, 2], 1001), ([7, 7], 7), ([1], 1)])
def test_unpack_row_agrees_with_a_loop_over_bits(counts, vocab_size, bits):
    row = random_row(counts, vocab_size)
    data = pack_row(*row, vocab_size, bits)
    expected = decode_row(data, len(counts), vocab_size, bits)
    found = by_id(*unpack_row(data, len(counts), vocab_size, bits))
    assert found[0].tolist() == [token for state in expected for token, _ in state]
    # The package rounds down to float32
    np.testing.assert_allclose(found[1], [value for state in expected for _, value in state], rtol=2e-7, atol=1e-9)
    assert found[0].tolist() == by_id(*row)[0].tolist()


# Half of the widest step: R of these rows is at most 12, the reach 6, so steps grow by exp(2) from 0.87 * 6 / 2^bits
@pytest.mark.parametrize(("bits", "tolerance"), [(6, 0.4), (8, 0.1), (10, 0.025), (16, 6e-4)])
def test_unpack_row_is_near_the_log_probs(bits, tolerance):
    row = random_row(MIXED, QWEN)
    _, found = by_id(*unpack_row(pack_row(*row, QWEN, bits), len(MIXED), QWEN, bits))
    # 6e-4: the mass is a float16
    np.testing.assert_allclose(found, by_id(*row)[1], atol=tolerance + 6e-4)


def test_unpack_row_32_bits_is_exact():
    counts, ids, log_probs = random_row(MIXED, QWEN)
    log_probs = log_probs.astype(np.float32)
    found = unpack_row(pack_row(counts, ids, log_probs, QWEN, 32), len(MIXED), QWEN, 32)
    assert by_id(*found)[1].tolist() == by_id(counts, ids, log_probs)[1].tolist()


@pytest.mark.parametrize(("size", "bits", "limit"), [(128, 8, 344), (50, 6, 127)])
def test_pack_row_random_states_cost_no_more_than_distillkits_format(size, bits, limit):
    row = random_row([size] * 60, QWEN)
    assert len(pack_row(*row, QWEN, bits)) / 60 <= limit


@pytest.mark.parametrize(("size", "limit"), [(1, 5.5), (4, 17), (10, 34), (20, 62)])
def test_pack_row_small_sets_are_cheap(size, limit):
    assert len(pack_row(*random_row([size] * 60, QWEN), QWEN, 8)) / 60 <= limit


def test_pack_row_worst_ids_cost_less_than_twice_random_ones():
    ids = np.arange(QWEN - 128, QWEN)
    _, _, log_probs = random_row([128], QWEN)
    assert len(pack_row(np.array([128]), ids, log_probs, QWEN, 8)) <= 2 * 322


@pytest.mark.parametrize("bits", [6, 8, 32])
def test_unpack_row_any_smaller_mass_is_a_prefix(bits):
    row = random_row([40] * 30, QWEN)
    counts, ids, log_probs = unpack_row(pack_row(*row, QWEN, bits), 30, QWEN, bits)
    for state in range(30):
        part = slice(40 * state, 40 * state + 40)
        pairs = list(zip(-log_probs[part], ids[part], strict=True))
        assert pairs == sorted(pairs)  # descending, equal ones by id
        probabilities = np.exp(log_probs[part].astype(np.float64))
        for p in (0.05, 0.3, 0.5, 0.7):
            # By hand: take the likeliest that is left until the mass is there
            left, chosen = list(range(40)), []
            while sum(probabilities[chosen]) < p and left:
                chosen.append(max(left, key=lambda index: probabilities[index]))
                left.remove(chosen[-1])
            size = int((np.cumsum(probabilities) - probabilities < p).sum())
            assert sorted(chosen) == list(range(size))


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_unpack_row_mass_is_kept_and_never_above_one(bits):
    # Sets that hold everything, a little more (as float32 may say), almost everything, and 30%
    rng, expected = np.random.default_rng(1), np.repeat([1.0, 1 + 5e-7, 1 - 1e-5, 0.3], 20)
    logits = rng.standard_normal((80, 200)) * 3
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    log_probs += np.log(expected)[:, None]
    counts, ids = np.full(80, 200), np.concatenate([rng.choice(1000, 200, replace=False) for _ in range(80)])
    *_, found = unpack_row(pack_row(counts, ids, log_probs.flatten(), 1000, bits), 80, 1000, bits)
    masses = np.exp(found.astype(np.float64)).reshape(80, 200).sum(axis=1)
    assert (masses <= 1).all()
    np.testing.assert_allclose(masses, expected, atol=2e-6, rtol=6e-4 * np.log(1 / 0.3))


def test_unpack_row_is_finer_where_the_probability_is_larger():
    # Pairs of tokens 0.05 nats apart: told apart near the top, not at probability e^-11
    log_probs = np.array([-1.0, -1.05, -11.0, -11.05])
    data = pack_row(np.array([4]), np.arange(4), log_probs, 10, bits=7)
    *_, found = unpack_row(data, 1, 10, bits=7)
    assert found[0] - found[1] == pytest.approx(0.05, abs=0.02)
    assert found[2] == found[3]


def test_unpack_row_extreme_log_probs_survive():
    log_probs = np.array([-1e-9, -103.0, -25.0, -2.0, -2.0])
    data = pack_row(np.array([3, 2]), np.array([4, 0, 9, 1, 2]), log_probs, 10, bits=8)
    counts, ids, found = unpack_row(data, 2, 10, bits=8)
    assert counts.tolist() == [3, 2] and ids.tolist() == [4, 9, 0, 1, 2]
    assert found[0] == pytest.approx(0, abs=2e-6) and found[2] == pytest.approx(-103, rel=0.07)
    assert found[3] == found[4] == pytest.approx(-2, abs=1e-3)


def test_pack_row_without_states_is_empty():
    data = pack_row(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), QWEN, 8)
    assert data == b"" and [len(part) for part in unpack_row(data, 0, QWEN, 8)] == [0, 0, 0]


@pytest.mark.parametrize(
    ("counts", "ids", "log_probs", "bits", "message"),
    [
        ([1], [3], [-1.0], 3, "`bits` is 3, but a log-probability takes 4 to 16 bits, or 32"),
        ([1], [3], [-1.0], 17, "`bits` is 17"),
        ([1, 0], [3], [-1.0], 8, "State 1 has 0 tokens"),
        ([2], [3, 3], [-1.0, -2.0], 8, "Token 3 occurs twice in a state"),
        ([1], [10], [-1.0], 8, "The ids go from 10 to 10, but the vocabulary has 10 tokens"),
        ([1], [-1], [-1.0], 8, "The ids go from -1 to -1"),
        ([2], [3, 4], [-1.0, np.nan], 8, "1 of 2 log-probabilities are not finite"),
        ([1], [3], [-np.inf], 32, "1 of 1 log-probabilities are not finite"),
    ],
)
def test_pack_row_refuses_what_has_no_code(counts, ids, log_probs, bits, message):
    with pytest.raises(ValueError, match=message):
        pack_row(np.array(counts), np.array(ids), np.array(log_probs), 10, bits)


def test_unpack_row_damaged_bytes_are_refused():
    data = pack_row(*random_row(MIXED, QWEN), QWEN, 8)
    for damaged, message in (
        (data[:-3], r"they hold \d+ tokens of 178"),
        (data[:60], r"\d+ bytes or more are needed, 60 are there"),
        (b"\7" + data[1:], "they begin with 7 instead of 1 or 2"),
        (data[:-1] + b"\xff", r"they hold \d+ tokens of 178"),
    ):
        with pytest.raises(ValueError, match=f"are damaged: {message}"):
            unpack_row(damaged, len(MIXED), QWEN, 8)


def test_examples_give_what_they_say():
    import doctest

    import torch

    from trl_kd.teachers import cache, cache_writer, packing

    names = {"np": np, "torch": torch} | vars(packing) | vars(cache) | vars(cache_writer)
    for function in (packing.pack_row, cache.top_sets, cache_writer.state_mask):
        text = re.sub(r"^ *```(python)?$", "", function.__doc__, flags=re.M)
        assert ">>>" in text
        example = doctest.DocTestParser().get_doctest(text, names, function.__name__, None, None)
        assert doctest.DocTestRunner(verbose=False).run(example).failed == 0
