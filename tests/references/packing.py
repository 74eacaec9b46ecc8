"""The bytes of a row of a teacher cache read bit by bit, written from the description of their layout."""

import math
import struct


def decode_row(data: bytes, num_states: int, vocab_size: int, bits: int) -> list[list[tuple[int, float]]]:
    """(id, log-probability) of each token of each state, in the order of ids."""
    width, at = data[0], 1
    counts = []
    for _ in range(num_states):
        counts.append(int.from_bytes(data[at : at + width], "little") + 1)
        at += width
    if bits == 32:
        values = [[struct.unpack_from("<f", data, at + 4 * i)[0] for i in range(sum(counts))]]
        at += 4 * sum(counts)
        flat = iter(values[0])
        log_probs = [[next(flat) for _ in range(count)] for count in counts]
    else:
        tails = [struct.unpack_from("<e", data, at + 2 * i)[0] for i in range(num_states)]
        at += 2 * num_states
        ranges = []
        for count in counts:
            ranges.append(2.0 ** (data[at] / 12 - 10) if count > 1 else None)
            at += count > 1
        coded = [count if count > 1 else 0 for count in counts]
        codes, at = bit_numbers(data, at, [bits] * sum(coded))
        flat = iter(codes)
        log_probs = []
        for count, number, tail, span in zip(counts, coded, tails, ranges, strict=True):
            distances = [0.0] * count
            if number:
                reach = max(6.0, 0.4 * span)
                full = 1 - math.exp(-span / reach)
                distances = [-reach * math.log(1 - next(flat) / (2**bits - 1) * full) for _ in range(count)]
            total = sum(math.exp(-distance) for distance in distances)
            log_probs.append([-tail - math.log(total) - distance for distance in distances])
    widths = [max(0, math.floor(math.log2(max(vocab_size * math.log(2) / count, 1)))) for count in counts]
    low, at = bit_numbers(data, at, [width for width, count in zip(widths, counts, strict=True) for _ in range(count)])
    flat, position, states = iter(low), 8 * at, []
    for width, values in zip(widths, log_probs, strict=True):
        token, tokens = -1, []
        for value in values:
            high = 0
            while not data[position // 8] >> position % 8 & 1:
                high, position = high + 1, position + 1
            position += 1
            token += (high << width) + next(flat) + 1
            tokens.append((token, value))
        states.append(tokens)
    return states


def bit_numbers(data: bytes, at: int, widths: list[int]) -> tuple[list[int], int]:
    """Numbers of these widths from byte `at` on, lowest bits first, and the first byte behind them."""
    position, numbers = 8 * at, []
    for width in widths:
        number = 0
        for bit in range(width):
            number |= (data[position // 8] >> position % 8 & 1) << bit
            position += 1
        numbers.append(number)
    return numbers, -(-position // 8)
