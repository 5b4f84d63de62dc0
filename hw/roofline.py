"""Closed forms of the roofline chapter: bytes that attention moves, waves of tiles on cores, tokens a second.

What a technique's own file counts (`hbm_accesses`, `decode_makespan`) is imported from ref; here it gets
bytes, heads, caches and seconds.
"""

from dataclasses import dataclass

from ref.attention.flash import block_sizes, hbm_accesses

ATTENTION_ALGORITHMS = ("standard", "flash", "flash2", "block_sparse", "eager")

# Passes of an eager framework over the N x N map, (reads, writes) in elements of the data type; the dropout
# mask is one byte an element and stands apart. Forward: scores written; mask, softmax and dropout each read
# and write; probabilities read. Backward: probabilities read, their gradient written; dropout, softmax (reads
# two), mask; the gradient of the scores read twice. With two-byte elements 8.5 and 11.5 passes.
EAGER_PASSES = {False: (1 * 0 + 1 + 1 + 1 + 1, 1 + 1 + 1 + 1), True: (1 + 1 + 2 + 1 + 2, 1 + 1 + 1 + 1)}


@dataclass(frozen=True)
class IoCount:
    """Bytes read from and written to main memory."""

    read: int
    write: int

    @property
    def total(self) -> int:
        """Bytes moved either way."""
        return self.read + self.write


def attention_io(
    n,
    d,
    *,
    sram_bytes,
    dtype_bytes,
    heads=1,
    algorithm="standard",
    density=1.0,
    causal=False,
    backward=False,
    l2_bytes=0,
    include_init=True,
) -> IoCount:
    """Bytes between main memory and the chip for self-attention of n tokens with head size d.

    Args: sram_bytes: on-chip memory of one core; it sets the tiles (`block_sizes`). dtype_bytes: of every
        element that travels, the row statistics too. heads: heads times batch.
      algorithm: "standard" (scores and probabilities travel once each way), "flash" (key tiles outside, the
        paper's), "flash2" (query tiles outside, forward only), "block_sparse" ("flash" that visits `density`
        of the tiles), "eager" (every elementwise step of a framework is a pass over the map, with dropout).
      density: share of tiles visited, in (0, 1]; block_sparse only.
      causal: tiles that lie wholly above the diagonal are skipped by flash and flash2; standard and eager
        compute the whole square, as their libraries do.
      backward: the backward pass instead of the forward one.
      l2_bytes: cache behind the cores. If K and V of one head fit, flash2 fetches them from memory once.
      include_init: count the first writes of accumulators that live in memory.
    Raises: ValueError naming the argument.
    Source: Theorem 2 of FlashAttention (Dao et al. 2022) through `hbm_accesses`.
    """
    if min(n, d, heads, dtype_bytes) < 1 or l2_bytes < 0:
        raise ValueError(
            f"n, d, heads and dtype_bytes must be positive, got {n=}, {d=}, {heads=}, {dtype_bytes=}"
        )
    if algorithm not in ATTENTION_ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(ATTENTION_ALGORITHMS)}, got {algorithm!r}")
    if not 0 < density <= 1 or (density != 1 and algorithm != "block_sparse"):
        raise ValueError(f'density must be in (0, 1], and 1 unless algorithm="block_sparse", got {density}')
    scale = heads * dtype_bytes
    if algorithm == "standard":
        c = hbm_accesses(n, n, d, backward=backward)
        return IoCount(c["reads"] * scale, c["writes"] * scale)
    if algorithm == "eager":
        reads, writes = EAGER_PASSES[backward]
        rows = {False: (3, 1), True: (5, 3)}[
            backward
        ]  # q, k, v in and o out; q, k, v, o, do in, dq, dk, dv out
        masks = heads * n * n  # one byte each, written forward and read backward
        return IoCount(
            (reads * n * n + rows[0] * n * d) * scale + masks * backward,
            (writes * n * n + rows[1] * n * d) * scale + masks * (not backward),
        )
    m = sram_bytes // dtype_bytes
    if m < 16 * d:
        raise ValueError(
            f"sram_bytes={sram_bytes} cannot hold one block of 16 rows of {d} elements: "
            f"need at least {16 * d * dtype_bytes} bytes"
        )
    kind = "flash" if algorithm == "block_sparse" else algorithm
    bare, full = (
        hbm_accesses(n, n, d, sram_elements=m, algorithm=kind, backward=backward, include_init=init)
        for init in (False, True)
    )
    # What is moved once, whatever the tiles: K and V in (and dK, dV out) for key tiles outside, Q for query
    # tiles.
    once_in = n * d if kind == "flash2" else 2 * n * d
    once_out = bare["writes"] if kind == "flash2" else 2 * n * d * backward
    seen, of = _visited(n, d, m, kind) if causal else (1, 1)
    moved_in, moved_out = bare["reads"] - once_in, bare["writes"] - once_out
    if kind == "flash2" and 0 < 2 * n * d * dtype_bytes <= l2_bytes:
        moved_in, seen, of = 2 * n * d, 1, 1
    part = lambda x: -(-int(x * seen) // of) if density == 1 else -(-int(x * seen * density) // of)
    init = (full["writes"] - bare["writes"]) * include_init
    return IoCount((once_in + part(moved_in)) * scale, (once_out + part(moved_out) + init) * scale)


def _visited(n, d, m, kind):
    """Rows of the inner operand that a causal loop loads, and those of the full loop."""
    block_q, block_k = block_sizes(m, d)
    if kind == "flash":  # key tile j meets query tiles from the one that holds row j * block_k
        loads = [n - j // block_q * block_q for j in range(0, n, block_k)]
    else:  # query tile i meets key tiles up to the one that holds its last row
        loads = [min(n, -(-min(i + block_q, n) // block_k) * block_k) for i in range(0, n, block_q)]
    return sum(loads), n * len(loads)


@dataclass(frozen=True)
class DecodeEstimate:
    """One step of decode attention: makespan in tiles, waves, share of busy slots, seconds, bytes of
    partials.
    """

    makespan: float
    waves: int
    occupancy: float
    seconds: float
    partial_bytes: int


def decode_estimate(
    lengths, num_heads, head_dim, target, *, method="fa2", num_splits=None, dtype_bytes=2
) -> DecodeEstimate:
    """Seconds of attention for one new token a request, with the schedule of `method` on a `Gpu`.

    Args: lengths: keys of each request, int [B]. num_heads: KV heads; query heads that share one ride along.
      method: "fa2" (one worker an output), "flash_decoding" (num_splits equal parts an output, by the
        heuristic if None), "lean" (stream-K).
    The tiles are 256 keys up to head size 64 and 128 above. A slot draws at most its share of the L2's
    bandwidth, all of them together at most the memory's; partial states (head_dim + 2 floats) are written
    once and read once; FlashDecoding with more than one split launches a second kernel.
    Source: `decode_makespan` (LeanAttention, arXiv 2405.10480).
    """
    from ref.attention.lean import decode_makespan

    block = 256 if head_dim <= 64 else 128
    slots = target.cores * target.ctas_per_core
    plan = decode_makespan(
        lengths, num_heads, block_n=block, num_workers=slots, method=method, num_splits=num_splits
    )
    key_bytes = 2 * head_dim * dtype_bytes
    slot_rate = target.l2_rate / slots
    all_bytes = sum(int(n) for n in lengths) * num_heads * key_bytes
    partial_bytes = plan["partial_states"] * (head_dim + 2) * 4
    launches = 2 if method == "flash_decoding" and plan["num_splits"] > 1 else 1
    seconds = (
        max(plan["makespan"] * block * key_bytes / slot_rate, all_bytes / target.hbm_rate)
        + 2 * partial_bytes / target.hbm_rate
        + launches * target.launch_s
    )
    return DecodeEstimate(plan["makespan"], plan["waves"], plan["occupancy"], seconds, partial_bytes)


@dataclass(frozen=True)
class Waves:
    """A product cut into tiles: steps of the contraction in all, steps of the busiest slot, their
    efficiency.
    """

    tiles: int
    makespan: float
    efficiency: float


def gemm_waves(m, n, k, target, *, method="data_parallel", splits=1) -> Waves:
    """Waves of C[m, n] = A[m, k] B[k, n] on the cores of `target`: an output tile is a row of contraction
    steps.

    method: "data_parallel" (a slot owns an output tile), "split_k" (`splits` slots share one), "stream_k"
    (equal shares of all steps, across tile borders). It is `decode_makespan` with output tiles for heads.
    """
    names = {"data_parallel": "fa2", "split_k": "flash_decoding", "stream_k": "lean"}
    if method not in names:
        raise ValueError(f"method must be one of {', '.join(names)}, got {method!r}")
    if min(m, n, k, splits) < 1:
        raise ValueError(f"m, n, k and splits must be at least 1, got {m=}, {n=}, {k=}, {splits=}")
    from ref.attention.lean import decode_makespan

    tile_m, tile_n, tile_k = target.tile
    outputs = -(-m // tile_m) * -(-n // tile_n)
    plan = decode_makespan(
        [k],
        outputs,
        block_n=tile_k,
        num_workers=target.cores * target.ctas_per_core,
        method=names[method],
        num_splits=splits if method == "split_k" else None,
    )
    return Waves(outputs * -(-k // tile_k), plan["makespan"], plan["occupancy"])


DEQUANT_OPS = 3  # unpack, subtract, scale: operations a weight below 16 bits (2 to 4 in practice)


def decode_tokens_per_s(params, bits, context, kv_bytes, target) -> float:
    """1 / max(bytes / bandwidth, operations / vector rate): the roof of decoding one token at batch 1.

    Args: params: weights read a token; bits: stored bits a weight, scales included. context: tokens in the
      cache; kv_bytes: bytes of the cache a token, all layers. target: a `Gpu` or a `Cpu`.
    A weight costs one multiply-accumulate, and below 16 bits DEQUANT_OPS vector operations more.
    Raises: DoesNotFit if weights, cache and the target's run time need more than it may use.
    """
    if params < 1 or bits <= 0 or context < 0 or kv_bytes < 0:
        raise ValueError(
            "need params >= 1, bits > 0, context >= 0 and kv_bytes >= 0, "
            f"got {params=}, {bits=}, {context=}, {kv_bytes=}"
        )
    moved = params * bits / 8 + context * kv_bytes
    target.check_memory(moved)
    ops = params * (2 + (DEQUANT_OPS if bits < 16 else 0))
    return 1 / max(moved / target.memory_rate, ops / target.vector_rate)


def roofline_points(report) -> list[tuple[float, float, str]]:
    """(operations a byte, operations a second, name) of every op that computes and takes
    time.
    """
    points = []
    for op in report.by_op:
        moved = op.bytes_by_level.get("hbm") or max(op.bytes_by_level.values(), default=0)
        if op.flops and moved and op.seconds:
            points.append((op.flops / moved, op.flops / op.seconds, op.label))
    return points
