"""The exercises of the chapter on GPUs and CPUs: a stub, what its solution must do, a solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""


# --8<-- [start:least_batch]
def least_batch(d, bytes_each, ridge):
    """The least number of tokens B at which a product [B, d] x [d, d] of numbers of
    `bytes_each` bytes does at least `ridge` operations a byte; None if no B does.
    It counts the bytes of the weights alone.
    """
    return -(-int(ridge * bytes_each) // 2)
    # --8<-- [end:least_batch]


# --8<-- [start:solve_least_batch]
def solve_least_batch(d, bytes_each, ridge):
    # 2 B d^2 >= ridge bytes (2 B d + d^2)  <=>  2 B (d - ridge bytes) >= ridge bytes d
    need = ridge * bytes_each
    if d <= need:
        return None
    return -(-need * d // (2 * (d - need)))
    # --8<-- [end:solve_least_batch]


def check_least_batch(least_batch):
    """One batch after the other, counted: operands read, result written."""
    cases = (4096, 2, 206), (4096, 4, 50), (1024, 1, 412), (512, 2, 206), (576, 2, 206), (400, 2, 206)
    for d, each, ridge in cases:
        enough = lambda B, d=d, each=each, ridge=ridge: 2 * B * d * d >= ridge * each * (2 * B * d + d * d)
        want = next((B for B in range(1, 100_000) if enough(B)), None)
        got = least_batch(d, each, ridge)
        assert got == want, (
            f"width {d}, {each} bytes a number, {ridge} operations a byte: {want} tokens, not {got}"
        )


# --8<-- [start:share_at_work]
def share_at_work(M, N, tile, slots):
    """The share of the matrix units' time that goes into an [M, N] result, cut in
    tiles of tile[0] x tile[1], a tile a slot at a time. It sees the tiles that
    stick out over the edge, and nothing else.
    """
    down, across = -(-M // tile[0]), -(-N // tile[1])
    return M * N / (down * tile[0] * across * tile[1])
    # --8<-- [end:share_at_work]


# --8<-- [start:solve_share_at_work]
def solve_share_at_work(M, N, tile, slots):
    tiles = -(-M // tile[0]) * -(-N // tile[1])
    waves = -(-tiles // slots)
    return M * N / (waves * slots * tile[0] * tile[1])
    # --8<-- [end:solve_share_at_work]


def check_share_at_work(share_at_work):
    """Tiles dealt to whichever slot is free; and the waves of the library."""
    from hw.gpu import h200
    from hw.roofline import gemm_waves

    wide = (128, 256)
    cases = (128, 128, (128, 128), 1), (130, 100, (128, 128), 4), (64, 50257, (64, 64), 108)
    cases += tuple((M, N, wide, 132) for M, N in ((4096, 4096), (1024, 4096), (1152, 3072)))
    for M, N, tile, slots in cases:
        busy = [0] * slots
        for _ in range(-(-M // tile[0]) * -(-N // tile[1])):
            busy[busy.index(min(busy))] += 1
        want = M * N / (max(busy) * slots * tile[0] * tile[1])
        if slots == 132:
            waves = gemm_waves(M, N, h200().tile[2], h200())
            assert max(busy) == waves.makespan
        got = share_at_work(M, N, tile, slots)
        assert abs(got - want) < 1e-12, (
            f"[{M}, {N}] in tiles of {tile[0]} x {tile[1]} on {slots} slots: {want:.1%}, not {got:.1%}"
        )
