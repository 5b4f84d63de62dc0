"""The exercises of the chapter on axial attention: a stub for the reader, what its solution must do, a
solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""

# --8<-- [start:context]
from ref.attention.axial import shift


def context(x, rows, columns, left):
    """What every pixel of x [B, H, W] is predicted from: `rows` mixes each row,
    `columns` each pixel with those above it, itself included, `left` with those
    to its left, itself included. shift(x, axis=1) moves an image down by one
    row, axis=2 to the right. As it stands a pixel may see itself.
    """
    above = columns(rows(x))
    return left(x + above)
    # --8<-- [end:context]


# --8<-- [start:solve_context]
from ref.attention.axial import shift


def solve_context(x, rows, columns, left):
    above = shift(columns(rows(x)), axis=1)
    return left(shift(x, axis=2) + above)
    # --8<-- [end:solve_context]


def check_context(context):
    """Pixel by pixel: changes reach all that follow in the order of reading, and nothing else."""
    import numpy as np

    H, W = 3, 4
    rows = lambda x: np.broadcast_to(x.sum(axis=2, keepdims=True), x.shape)
    columns, left = (lambda x: np.cumsum(x, axis=1)), (lambda x: np.cumsum(x, axis=2))
    one_each = np.eye(H * W).reshape(H * W, H, W)
    reached = np.asarray(context(one_each, rows, columns, left)).reshape(H * W, H * W) != 0
    for a in range(H * W):
        for b in range(H * W):
            first, second = divmod(a, W), divmod(b, W)
            if reached[a, b] and a >= b:
                raise AssertionError(f"pixel {second} sees pixel {first}, which does not come before it")
            assert reached[a, b] or a >= b, f"pixel {second} does not see pixel {first} before it"


# --8<-- [start:saved]
def saved(H, W, outer, inner):
    """How many times fewer layers' worth of work it takes to draw an H x W image
    with the outer stack run once a row and the inner stack on one row at a time,
    than with all layers run at every pixel. A layer's worth is one layer over
    the whole image. As it stands the inner stack runs over all rows.
    """
    naive = H * W * (outer + inner)
    fast = H * outer + H * W * inner
    return naive / fast
    # --8<-- [end:saved]


# --8<-- [start:solve_saved]
def solve_saved(H, W, outer, inner):
    naive = H * W * (outer + inner)
    fast = H * outer + W * inner  # H W times one of H rows
    return naive / fast
    # --8<-- [end:solve_saved]


def check_saved(saved):
    """The multiply-accumulates of the library, where row and column blocks cost the same."""
    from ref.attention.axial import axial_cost

    for S, outer, inner in ((2, 2, 2), (8, 2, 1), (8, 4, 2), (32, 2, 8)):
        c = axial_cost((S, S), emb_dim=8, num_heads=1, num_outer=outer, num_inner=inner)
        want = c["macs_sample_naive"] / c["macs_sample_semi_parallel"]
        got = saved(S, S, outer, inner)
        assert abs(got - want) < 1e-9 * want, (
            f"{S} x {S}, {outer} outer and {inner} inner layers: {want:.4g} times fewer, not {got:.4g}"
        )
