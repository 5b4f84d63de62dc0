"""The exercises of the chapter on LoGAH: a stub for the reader, what its solution must do, a solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""

# --8<-- [start:matrix]
import numpy as np


def matrix(v, c_out, c_in):
    """W [c_out, c_in] = A B from the decoder's numbers v [2 r, K], read again in the order
    of memory as [2 K, r]: A its first rows, B^T the rows from K on. As it stands v is
    transposed instead.
    """
    r, K = v.shape[0] // 2, v.shape[1]
    rows = v.T.reshape(2 * K, r)
    return rows[:c_out] @ rows[K : K + c_in].T
    # --8<-- [end:matrix]


# --8<-- [start:solve_matrix]
def solve_matrix(v, c_out, c_in):
    r, K = v.shape[0] // 2, v.shape[1]
    rows = v.reshape(2 * K, r)
    return rows[:c_out] @ rows[K : K + c_in].T
    # --8<-- [end:solve_matrix]


def check_matrix(matrix):
    """Number by number: entry (i, j) of A is the (i r + j)-th of memory."""
    rng = np.random.default_rng(0)
    for r, K, o, i in ((2, 5, 4, 3), (3, 4, 4, 4), (1, 6, 2, 5)):
        v = rng.standard_normal((2 * r, K))
        flat = v.ravel().tolist()
        a = [[flat[row * r + j] for j in range(r)] for row in range(o)]
        b = [[flat[(K + row) * r + j] for j in range(r)] for row in range(i)]
        want = np.array([[sum(x * y for x, y in zip(p, q, strict=True)) for q in b] for p in a])
        got = np.asarray(matrix(v.copy(), o, i))
        assert got.shape == (o, i), f"the matrix has shape {got.shape}, not {(o, i)}"
        off = np.abs(got - want).max()
        assert off < 1e-12, f"rank {r}, K = {K}: the matrix is off by {off:.3f}"


# --8<-- [start:distances]
def distances(adj, cutoff):
    """Lengths of shortest paths [N][N], 1 for an edge, 0 where no path has at most cutoff
    steps, from adj [N][N] of zeros and ones without cycles. As it stands only edges
    count.
    """
    return [list(row) for row in adj]
    # --8<-- [end:distances]


# --8<-- [start:solve_distances]
def solve_distances(adj, cutoff):
    N = len(adj)
    found = [list(row) for row in adj]
    for length in range(2, cutoff + 1):
        for u in range(N):
            for v in range(N):
                if not found[u][v] and any(found[u][m] == length - 1 and adj[m][v] for m in range(N)):
                    found[u][v] = length
    return found
    # --8<-- [end:solve_distances]


def check_distances(distances):
    """The library's virtual edges, on the graph of a small transformer and on drawn ones."""
    from ref.training.logah import TargetConfig, transformer_graph, virtual_edges

    graphs = [np.asarray(transformer_graph(TargetConfig("vit", 8, 1, 2)).edges == 1, int)]
    rng = np.random.default_rng(0)
    graphs += [np.triu(rng.random((7, 7)) < 0.3, 1).astype(int) for _ in range(3)]
    for adj in graphs:
        for cutoff in (1, 3, 50):
            got, want = np.asarray(distances(adj.tolist(), cutoff)), virtual_edges(adj, cutoff=cutoff)
            assert got.shape == want.shape, f"the result has shape {got.shape}, not {want.shape}"
            for u, v in np.argwhere(got != want):
                raise AssertionError(
                    f"from node {u} to {v} it is {want[u, v]} steps ({cutoff = }), not {got[u, v]}"
                )


# --8<-- [start:decoder]
def decoder(d, r, K):
    """Numbers of the decoder with biases: d -> 4 d -> 8 d -> 2 r^2, a map r -> K, and one
    unused map r -> r. As it stands the last layer writes a whole K x K matrix.
    """
    return (d + 1) * 4 * d + (4 * d + 1) * 8 * d + (8 * d + 1) * K * K
    # --8<-- [end:decoder]


# --8<-- [start:solve_decoder]
def solve_decoder(d, r, K):
    mlp = (d + 1) * 4 * d + (4 * d + 1) * 8 * d + (8 * d + 1) * 2 * r * r
    return mlp + (r + 1) * K + (r + 1) * r
    # --8<-- [end:solve_decoder]


def check_decoder(decoder):
    """The library's count of the four variants."""
    from ref.training.logah import VARIANTS, count_parameters

    for name, c in VARIANTS.items():
        got, want = decoder(c.dim, c.rank, c.K), count_parameters(c)["decoder"]
        assert got == want, (
            f"{name}, d = {c.dim}, r = {c.rank}: the decoder has {want:,} numbers, not {got:,}"
        )
