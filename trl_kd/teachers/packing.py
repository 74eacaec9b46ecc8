"""
The teacher's top tokens of one row as bytes, and back: vectorised, with no loop over states or tokens.

A row has T states; state t has n_t different tokens with their log-probabilities over the whole vocabulary. The order
of the tokens says nothing beyond the log-probabilities, so they are kept in the order of their ids, and of these the
gaps, which are small numbers: for random ids, about 0.2 bits per token above the least possible (the logarithm of
the number of sets).
"""

import math

import numpy as np


MIN_BITS, MAX_BITS, EXACT_BITS = 4, 16, 32

# A log-probability is coded by its distance x from the largest one of its state. An error e of it costs about p e^2/2
# nats, so steps are finest at x = 0 and grow by exp(x / reach). Least KL of those tried on the teachers of
# `examples/benchmarks/cache_size.py`; the share of R, the largest distance of the state, bounds the steps at its end.
_REACH, _REACH_SHARE = 6.0, 0.4
# R itself: one byte for 2^-10 to 2^11 nats, at most 6% too large
_STEPS_PER_OCTAVE, _LOWEST_OCTAVE = 12, -10
# Least mass outside of a set, in nats, so that rounding never makes the decoded mass exceed 1
_LEAST_TAIL = 2.0**-20
_DAMAGED = "The bytes of a row of the teacher cache are damaged: {}. Write the cache again with `trl-kd cache`."


def pack_row(counts: np.ndarray, ids: np.ndarray, log_probs: np.ndarray, vocab_size: int, bits: int) -> bytes:
    r"""
    Codes the tokens of the states of one row.

    Layout: a byte (1 or 2: bytes of a count); counts less one; the log of the mass of each set (float16); the ranges
    of log-probabilities (a byte each; none for a single token) and their codes; the low parts of the gaps between ids;
    the high parts in unary. With `bits=32`, the log-probabilities themselves (float32) stand in the place of masses,
    ranges and codes.

    Args:
        counts (`np.ndarray` of shape `(T,)`):
            Number of tokens of each state, at least one.
        ids (`np.ndarray` of shape `(N,)`):
            Tokens of all states, one state after the other, in any order inside of a state; no token twice.
        log_probs (`np.ndarray` of shape `(N,)`):
            Their log-probabilities over the whole vocabulary, finite.
        vocab_size (`int`):
            Number of tokens of the vocabulary, V.
        bits (`int`):
            Bits per log-probability: 4 to 16, or 32 for no rounding.

    Returns:
        `bytes`

    Raises:
        ValueError: If `bits` is none of these, a state has no token, a token occurs twice or is outside of the
            vocabulary, or a log-probability is not finite.

    Examples:

    ```python
    >>> data = pack_row(np.array([1, 2]), np.array([7, 9, 3]), np.log([0.9, 0.25, 0.5]), vocab_size=10, bits=8)
    >>> counts, ids, log_probs = unpack_row(data, 2, vocab_size=10, bits=8)
    >>> counts, ids, np.exp(log_probs).round(2)  # sorted by probability in each state
    (array([1, 2]), array([7, 3, 9]), array([0.9 , 0.5 , 0.25], dtype=float32))
    ```
    """
    check_bits(bits)
    if len(counts) == 0:
        return b""
    counts, ids = counts.astype(np.int64), ids.astype(np.int64)
    states = np.repeat(np.arange(len(counts)), counts)
    _check_row(counts, ids, log_probs, vocab_size)
    order = np.lexsort((ids, states))
    ids, log_probs = ids[order], log_probs[order].astype(np.float64)
    starts = np.cumsum(counts) - counts
    gaps = np.diff(ids, prepend=-1) - 1
    gaps[starts] = ids[starts]
    if (gaps < 0).any():
        raise ValueError(
            f"Token {ids[np.argmin(gaps)]} occurs twice in a state, but a set has each token once. Pass different ids."
        )
    widths = np.repeat(_low_widths(counts, vocab_size), counts)
    count_bytes = 1 if counts.max() <= 256 else 2
    high = np.cumsum((gaps >> widths) + 1)
    unary = np.zeros(high[-1], dtype=np.uint8)
    unary[high - 1] = 1
    if bits == EXACT_BITS:
        values = [_at_most_one(log_probs, states, starts).astype("<f4").tobytes()]
    else:
        values = _quantise(log_probs, counts, states, starts, bits)
    return b"".join(
        [
            bytes([count_bytes]),
            (counts - 1).astype(f"<u{count_bytes}").tobytes(),
            *values,
            _pack_bits(gaps & ((1 << widths) - 1), widths),
            np.packbits(unary, bitorder="little").tobytes(),
        ]
    )


def unpack_row(data: bytes, num_states: int, vocab_size: int, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    r"""
    Decodes [`pack_row`].

    Args:
        data (`bytes`):
            What it returned.
        num_states (`int`):
            Number of states, T.
        vocab_size (`int`):
            Number of tokens of the vocabulary, V.
        bits (`int`):
            Bits per log-probability.

    Returns:
        `tuple[np.ndarray, np.ndarray, np.ndarray]`: counts `(T,)` and ids `(N,)`, int64, and log-probabilities `(N,)`,
        float32. In each state, tokens are sorted by descending log-probability, equal ones by id, so that a set of
        less mass is a prefix. The probabilities of a state sum to at most 1.

    Raises:
        ValueError: If the bytes are not those of such a row.
    """
    if num_states == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32)
    reader = _Reader(data)
    count_bytes = int(reader.take("u1", 1)[0])
    if count_bytes not in (1, 2):
        raise ValueError(_DAMAGED.format(f"they begin with {count_bytes} instead of 1 or 2"))
    counts = reader.take(f"<u{count_bytes}", num_states).astype(np.int64) + 1
    states = np.repeat(np.arange(num_states), counts)
    starts = np.cumsum(counts) - counts
    if bits == EXACT_BITS:
        log_probs = reader.take("<f4", len(states))
    else:
        log_probs = _dequantise(reader, counts, states, starts, bits)
    widths = np.repeat(_low_widths(counts, vocab_size), counts)
    low = reader.take_bits(widths)
    ones = np.flatnonzero(np.unpackbits(reader.rest(), bitorder="little"))
    if len(ones) != len(states):
        raise ValueError(_DAMAGED.format(f"they hold {len(ones)} tokens of {len(states)}"))
    high = np.diff(ones, prepend=-1) - 1
    ends = np.cumsum((high << widths) + low + 1)
    ids = ends - np.repeat(np.concatenate([[0], ends[starts[1:] - 1]]), counts) - 1
    if (ids >= vocab_size).any():
        raise ValueError(_DAMAGED.format(f"token {ids.max()} is outside of the vocabulary of {vocab_size}"))
    order = np.lexsort((-log_probs, states))  # stable: equal ones stay in the order of their ids
    return counts, ids[order], log_probs[order]


def check_bits(bits: int) -> None:
    """Refuse a number of bits that there is no code for."""
    if bits != EXACT_BITS and not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(
            f"`bits` is {bits}, but a log-probability takes {MIN_BITS} to {MAX_BITS} bits, or {EXACT_BITS} to be kept "
            "as it is. Set one of these."
        )


def _check_row(counts: np.ndarray, ids: np.ndarray, log_probs: np.ndarray, vocab_size: int) -> None:
    """Refuse what has no code."""
    if counts.min() < 1:
        raise ValueError(
            f"State {int(counts.argmin())} has {counts.min()} tokens, but the teacher has a likeliest one everywhere. "
            "Keep at least one."
        )
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(
            f"The ids go from {ids.min()} to {ids.max()}, but the vocabulary has {vocab_size} tokens. Pass the size "
            "of the teacher's head."
        )
    if not np.isfinite(log_probs).all():
        raise ValueError(
            f"{int((~np.isfinite(log_probs)).sum())} of {len(log_probs)} log-probabilities are not finite, so there "
            "is nothing to learn from them. Check the teacher's weights and its dtype."
        )


def _low_widths(counts: np.ndarray, vocab_size: int) -> np.ndarray:
    """Bits of the low part of a gap in each state, so that the whole is shortest for random ids (a Rice code)."""
    return np.floor(np.log2(np.maximum(vocab_size * math.log(2) / counts, 1))).astype(np.int64)


def _quantise(
    log_probs: np.ndarray, counts: np.ndarray, states: np.ndarray, starts: np.ndarray, bits: int
) -> list[bytes]:
    """Masses, ranges and codes of log-probabilities."""
    distances = np.maximum.reduceat(log_probs, starts)[states] - log_probs
    spans = np.maximum(np.maximum.reduceat(distances, starts), 2.0**_LOWEST_OCTAVE)
    scales = np.ceil(_STEPS_PER_OCTAVE * (np.log2(spans) - _LOWEST_OCTAVE)).clip(0, 255).astype(np.uint8)
    levels = _levels(scales, bits)
    has_codes = counts > 1
    coded = has_codes[states]
    reach, last = (values[states[coded]] for values in levels)
    codes = np.rint(-np.expm1(-np.minimum(distances[coded], 1e3) / reach) / last).clip(0, 2**bits - 1).astype(np.int64)
    masses = np.add.reduceat(np.exp(log_probs), starts)
    tails = np.maximum(-np.log(masses), _LEAST_TAIL)
    rounded = tails.astype("<f2")
    # Up: a mass that is a little too small leaves a little too much to the rest, never less than nothing
    rounded = np.where(rounded < tails, np.nextafter(rounded, np.float16(np.inf)), rounded).astype("<f2")
    widths = np.full(len(codes), bits)
    return [rounded.tobytes(), scales[has_codes].tobytes(), _pack_bits(codes, widths)]


def _dequantise(
    reader: "_Reader", counts: np.ndarray, states: np.ndarray, starts: np.ndarray, bits: int
) -> np.ndarray:
    """Log-probabilities from masses, ranges and codes."""
    tails = reader.take("<f2", len(counts)).astype(np.float64)
    has_codes = counts > 1
    scales = np.zeros(len(counts), np.uint8)
    scales[has_codes] = reader.take("u1", int(has_codes.sum()))
    coded = has_codes[states]
    reach, last = (values[states[coded]] for values in _levels(scales, bits))
    distances = np.zeros(len(states))
    distances[coded] = -reach * np.log1p(-reader.take_bits(np.full(int(coded.sum()), bits)) * last)
    shares = -distances - np.log(np.add.reduceat(np.exp(-distances), starts))[states]
    return _rounded_down(shares - tails[states])


def _levels(scales: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Per state: the reach of its quantiser, and the step between two codes after compression."""
    ranges = 2.0 ** (scales / _STEPS_PER_OCTAVE + _LOWEST_OCTAVE)
    reach = np.maximum(_REACH, _REACH_SHARE * ranges)
    return reach, -np.expm1(-ranges / reach) / (2**bits - 1)


def _at_most_one(log_probs: np.ndarray, states: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Log-probabilities as they are, but for states whose rounded probabilities sum to more than 1."""
    excess = np.maximum(np.log(np.add.reduceat(np.exp(log_probs), starts)), 0.0)
    return _rounded_down(log_probs - excess[states])


def _rounded_down(values: np.ndarray) -> np.ndarray:
    """The largest float32 that is not above each float64."""
    rounded = values.astype(np.float32)
    return np.where(rounded > values, np.nextafter(rounded, np.float32(-np.inf)), rounded)


def _pack_bits(values: np.ndarray, widths: np.ndarray) -> bytes:
    """Numbers of the given widths (at most 25 bits), one after the other, the lowest bit first."""
    ends = np.cumsum(widths)
    if len(ends) == 0:
        return b""
    at = ends - widths
    size = int(ends[-1] + 7) // 8
    shifted = values << (at & 7)
    data = np.zeros(size + 4)
    for byte in range(4):
        # No two numbers share a bit, so their sum is their union
        data += np.bincount((at >> 3) + byte, weights=(shifted >> (8 * byte)) & 255, minlength=size + 4)
    return data[:size].astype(np.uint8).tobytes()


class _Reader:
    """Takes one part after the other from the bytes of a row."""

    def __init__(self, data: bytes):
        self._data = np.frombuffer(data, np.uint8)
        self._at = 0

    def take(self, dtype: str, count: int) -> np.ndarray:
        """So many numbers of a type."""
        return self._bytes(count * np.dtype(dtype).itemsize).view(dtype)

    def take_bits(self, widths: np.ndarray) -> np.ndarray:
        """Numbers of the given widths, as written by `_pack_bits`."""
        ends = np.cumsum(widths)
        if len(ends) == 0:
            return np.zeros(0, np.int64)
        data = np.pad(self._bytes(int(ends[-1] + 7) // 8), (0, 4)).astype(np.int64)
        at = ends - widths
        first = at >> 3
        window = data[first] | data[first + 1] << 8 | data[first + 2] << 16 | data[first + 3] << 24
        return (window >> (at & 7)) & ((1 << widths) - 1)

    def rest(self) -> np.ndarray:
        """All that is left."""
        return self._data[self._at :]

    def _bytes(self, size: int) -> np.ndarray:
        if self._at + size > len(self._data):
            raise ValueError(
                _DAMAGED.format(f"{self._at + size} bytes or more are needed, {len(self._data)} are there")
            )
        part = self._data[self._at : self._at + size].copy()
        self._at += size
        return part
