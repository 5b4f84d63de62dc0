"""The exercises of the chapter on Edge-MoE: a stub for the reader, what its solution must do, a solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""


# --8<-- [start:steps]
def steps(N, P):
    """Steps of attention over N tokens with P lanes, lane j a step behind lane
    j - 1, one key a step. It counts N keys for every block of P queries.
    """
    return N * -(-N // P)
    # --8<-- [end:steps]


# --8<-- [start:solve_steps]
def solve_steps(N, P):
    blocks, late = divmod(N + P - 1, P)
    return N * blocks + late
    # --8<-- [end:solve_steps]


def check_steps(steps):
    """The controller as a state machine that runs until every pair is formed."""
    from hw.stream import simulate_attention

    for N in range(1, 14):
        for P in range(1, N + 1):
            want, got = simulate_attention(N, parallel=P).steps, steps(N, P)
            assert got == want, f"{N} tokens on {P} lanes take {want} steps, not {got}"


# --8<-- [start:gelu_by_table]
import numpy as np


def gelu_by_table(x, table):
    """GELU of x [n] from the table of delta at 0, 1/32, ..., 5.5, straight lines
    between its entries. As it stands the table is entered at x itself, and only
    where x is positive.
    """
    at = np.arange(len(table)) / 32
    return np.where(x > 0, x - np.interp(x, at, table), 0.0)
    # --8<-- [end:gelu_by_table]


# --8<-- [start:solve_gelu_by_table]
def solve_gelu_by_table(x, table):
    at = np.arange(len(table)) / 32
    size = np.abs(x)
    return np.maximum(x, 0) - np.where(size >= at[-1], 0.0, np.interp(size, at, table))
    # --8<-- [end:solve_gelu_by_table]


def check_gelu_by_table(gelu_by_table):
    """Within the error of a chord, max |delta''| / (8 * 32^2), of GELU, on both sides."""
    from ref.blocks.mlp import gelu

    at = np.arange(177) / 32
    table = at - gelu(at)
    bound = 2 / np.sqrt(2 * np.pi) / (8 * 32**2) + 6e-7  # and what is left of delta beyond 5.5
    x = np.linspace(-8, 8, 4001)
    error = np.abs(np.asarray(gelu_by_table(x, table)) - gelu(x))
    worst = int(error.argmax())
    assert error.max() <= bound, (
        f"at {x[worst]:.3f} it is off by {error.max():.1e}; chords of 1/32 are within {bound:.1e}"
    )


# --8<-- [start:loads]
def loads(N, k, E):
    """Experts that have a token, on average, when each of N tokens draws k of E,
    all sets alike. It takes every choice for another expert, while there are any.
    """
    return min(N * k, E)
    # --8<-- [end:loads]


# --8<-- [start:solve_loads]
def solve_loads(N, k, E):
    return E * (1 - (1 - k / E) ** N)
    # --8<-- [end:solve_loads]


def check_loads(loads):
    """All choices there are, through the queues of the library."""
    from itertools import combinations, product

    from ref.devices.edge_moe import build_expert_queues

    for N, k, E in ((1, 2, 4), (2, 2, 4), (3, 2, 4), (4, 1, 3), (2, 3, 5)):
        counts = []
        for choice in product(combinations(range(E), k), repeat=N):
            *_, active = build_expert_queues(np.array(choice), np.ones((N, k)), num_experts=E)
            counts.append(len(active))
        want, got = np.mean(counts), loads(N, k, E)
        assert abs(got - want) < 1e-9, f"{N} tokens, {k} of {E} experts: {want:.4f} on average, not {got:.4f}"
