"""ListOps: nested expressions such as [MAX 2 9 [MIN 4 7 ] 0 ], whose value is one digit.

Source: Nangia and Bowman 2018 (arXiv 1804.06028); the sampler of Long Range Arena (Tay et al. 2020, arXiv
2011.04006): a node is a digit with probability 3/4.
"""

import numpy as np

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")  # [SM is the sum modulo 10, [MED the median rounded down
WORDS = ("", *map(str, range(10)), *OPERATORS, "]")  # a token is a place in this tuple, 0 is padding
LEAF = 0.75


def listops(rng, n, *, max_length, max_depth=4, max_args=10, min_length=4):
    """(tokens int32 [n, max_length] padded with 0, label int32 [n] in 0..9).

    Args: rng: NumPy Generator. Lengths are min_length..max_length tokens (an operator with two digits has 4);
      other draws are thrown away. max_depth: levels, the last of which are digits; operators have
      2..max_args arguments.
    Raises: ValueError if nothing can be that long, or an argument is too small.
    """
    if n < 0 or max_depth < 2 or max_args < 2 or not 1 <= min_length <= max_length or max_length < 4:
        raise ValueError(
            f"need max_depth >= 2, max_args >= 2 and 1 <= min_length <= max_length >= 4, got {max_depth=}, "
            f"{max_args=}, {min_length=}, {max_length=}"
        )
    longest = 1
    for _ in range(max_depth - 1):
        longest = 2 + max_args * longest
    if longest < min_length:
        raise ValueError(
            f"min_length must be at most {longest} with {max_depth=} and {max_args=}, got {min_length}"
        )
    tokens, label = np.zeros((n, max_length), np.int32), np.zeros(n, np.int32)
    for row in range(n):
        words, value = _draw(rng, 1, max_depth, max_args)
        while not min_length <= len(words) <= max_length:
            words, value = _draw(rng, 1, max_depth, max_args)
        tokens[row, : len(words)], label[row] = words, value
    return tokens, label


def _draw(rng, depth, max_depth, max_args):
    """(tokens, value) of one node."""
    if depth == max_depth or rng.random() < LEAF:
        digit = int(rng.integers(10))
        return [1 + digit], digit
    parts = [_draw(rng, depth + 1, max_depth, max_args) for _ in range(rng.integers(2, max_args + 1))]
    operator, values = int(rng.integers(len(OPERATORS))), [value for _, value in parts]
    value = int((min, max, np.median, lambda x: sum(x) % 10)[operator](values))
    return [11 + operator, *(t for words, _ in parts for t in words), 15], value
