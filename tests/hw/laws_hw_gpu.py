"""Laws of the roofline targets' closed forms: NumPy and Hypothesis, so that they also run in the browser."""

import math
from dataclasses import replace

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from hw.cpu import PRESETS as CPUS
from hw.gpu import PRESETS as GPUS
from hw.gpu import a100, attention_io, decode_estimate, decode_tokens_per_s, gemm_waves, h100
from ref.attention.flash import block_sizes

DEVICES = {**{n: f() for n, f in GPUS.items()}, **{n: f() for n, f in CPUS.items()}}
sizes = st.integers(1, 70)
heads = st.sampled_from((1, 3, 8))


def loads(n, d, m, *, outer, causal):
    """(read, written) elements of tiled attention, tile by tile: every load and store of a block written
    out.
    """
    block_q, block_k = block_sizes(m, d)
    queries = [range(i, min(i + block_q, n)) for i in range(0, n, block_q)]
    keys = [range(j, min(j + block_k, n)) for j in range(0, n, block_k)]
    meets = lambda q, k: not causal or k[0] <= q[-1]
    read = written = 0
    if outer == "keys":
        written += n * d + 2 * n  # o, l, m set to their first values
        for k in keys:
            read += 2 * len(k) * d
            for q in queries:
                if meets(q, k):
                    read += len(q) * (2 * d + 2)  # q, o, l, m
                    written += len(q) * (d + 2)
    else:
        for q in queries:
            read += len(q) * d
            for k in keys:
                if meets(q, k):
                    read += 2 * len(k) * d
            written += len(q) * (d + 1)  # o and the log-sum-exp
    return read, written


@given(sizes, sizes, st.integers(16, 200), st.booleans(), heads, st.sampled_from((1, 2, 4)))
def law_hw_gpu_attention_bytes_equal_a_loop_of_block_loads(n, d, rows, causal, heads, width):
    """Any N, d and M, remainders and causal skipping included."""
    m = rows * d + rows % 7
    for algorithm, outer in (("flash", "keys"), ("flash2", "queries")):
        got = attention_io(
            n, d, sram_bytes=m * width, dtype_bytes=width, heads=heads, algorithm=algorithm, causal=causal
        )
        want = loads(n, d, m, outer=outer, causal=causal)
        assert (got.read, got.write) == tuple(x * heads * width for x in want)
        assert got.total == sum(want) * heads * width


@given(st.integers(2, 64), st.integers(1, 8), st.integers(0, 4000))
def law_hw_gpu_tiled_attention_never_moves_more_when_tiles_divide(d, tiles, more):
    """T_c (3 d + 4) <= 4 N when d (3 d + 4) <= M and B_c divides N: then flash <= standard, first writes
    too.
    """
    m = max(d * (3 * d + 4), 16 * d) + more
    n = tiles * block_sizes(m, d)[1]
    io = lambda algorithm: attention_io(n, d, sram_bytes=m, dtype_bytes=1, algorithm=algorithm).total
    assert io("flash") <= io("standard") < io("eager")


def law_hw_gpu_tiled_attention_can_lose_when_tiles_do_not_divide():
    io = lambda algorithm: attention_io(16, 16, sram_bytes=832, dtype_bytes=1, algorithm=algorithm).total
    assert (io("flash"), io("standard")) == (2464, 2048)


@given(st.integers(1, 64), st.integers(1, 64))
def law_hw_gpu_one_tile_reads_everything_once(n, d):
    assume(n <= d)  # B_r = min(B_c, d) reaches N
    io = attention_io(n, d, sram_bytes=4 * d * max(n, 16), dtype_bytes=1, algorithm="flash2")
    assert (io.read, io.write) == (3 * n * d, n * d + n)
    cached = attention_io(n, d, sram_bytes=16 * d, dtype_bytes=1, algorithm="flash2", l2_bytes=2 * n * d)
    assert (cached.read, cached.write) == (io.read, io.write)


@given(sizes, sizes, st.floats(0.01, 1), st.floats(0.01, 1), st.booleans())
def law_hw_gpu_sparser_attention_moves_less_and_never_less_than_its_inputs(n, d, a, b, backward):
    io = lambda s: (
        attention_io(
            n, d, sram_bytes=20 * d, dtype_bytes=1, algorithm="block_sparse", density=s, backward=backward
        ).total
    )
    low, high = sorted((a, b))
    assert n * d <= io(low) <= io(high) <= io(1.0)
    full = attention_io(n, d, sram_bytes=20 * d, dtype_bytes=1, algorithm="flash", backward=backward)
    assert io(1.0) == full.total


def law_hw_gpu_paper_setting_orders_the_algorithms():
    """GPT-2 medium on an A100: flash < standard < eager, forward and backward, and about 20 eager passes."""
    n, d, h = 1024, 64, 16 * 64
    io = lambda algorithm: sum(
        attention_io(
            n, d, sram_bytes=164 * 1024, dtype_bytes=2, heads=h, algorithm=algorithm, backward=b
        ).total
        for b in (False, True)
    )
    assert io("flash") < io("standard") < io("eager")
    rows = (4 + 8) * n * d * 2 * h  # q, k, v, o and their gradients
    assert io("eager") - rows == 20 * h * n * n * 2


@given(
    st.integers(1, 4), st.integers(1, 64), st.integers(1, 40000),
    st.sampled_from((64, 128)), st.integers(1, 16), st.sampled_from(("a100", "h100")),
)  # fmt: skip
def law_hw_gpu_stream_k_is_never_slower_than_any_split(batch, kv_heads, n, d, splits, name):
    """No launch and no fix-up: lean <= every fixed split <= one worker an output; lean >= T / G tiles."""
    device = {"a100": a100, "h100": h100}[name](ideal=True)
    run = lambda method, **kw: decode_estimate([n] * batch, kv_heads, d, device, method=method, **kw)
    lean, fa2, split = run("lean"), run("fa2"), run("flash_decoding")
    tiles = batch * kv_heads * math.ceil(n / (256 if d <= 64 else 128))
    slots = device.cores * device.ctas_per_core
    assert tiles / slots <= lean.makespan <= split.makespan <= fa2.makespan
    assert lean.makespan <= run("flash_decoding", num_splits=splits).makespan
    if tiles >= slots:
        assert lean.occupancy >= tiles / (tiles + slots - 1) - 1e-12
    if batch * kv_heads % slots == 0:
        assert lean.makespan == fa2.makespan == split.makespan
    for x in (lean, fa2, split):
        moved = 2 * n * d * kv_heads * batch * 2
        assert x.seconds * device.hbm_rate >= moved * (1 - 1e-12)  # the memory's roof


@given(st.integers(1, 4096), st.integers(1, 4096), st.integers(1, 4096), st.integers(1, 8))
def law_hw_gpu_waves_of_a_product(m, n, k, splits):
    device = a100()
    waves = {
        method: gemm_waves(m, n, k, device, method=method, splits=splits)
        for method in ("data_parallel", "split_k", "stream_k")
    }
    steps = math.ceil(m / 128) * math.ceil(n / 128) * math.ceil(k / 32)
    assert all(w.tiles == steps for w in waves.values())
    assert waves["stream_k"].makespan <= min(waves["data_parallel"].makespan, waves["split_k"].makespan)
    assert all(0 < w.efficiency <= 1 for w in waves.values())


@given(
    st.sampled_from(sorted(DEVICES)), st.lists(st.sampled_from((2, 3.4375, 4, 4.5, 8, 8.5, 16)), min_size=2),
    st.integers(0, 4096), st.integers(0, 4096),
)  # fmt: skip
def law_hw_gpu_tokens_a_second_fall_with_bits_and_context(name, bits, context, more):
    device = DEVICES[name]
    speed = lambda b, c: decode_tokens_per_s(134_515_008, b, c, 23_040, device)
    # Among packed formats, or among plain ones: where unpacking binds (a TPU at 2 bits), 16 bits are faster.
    packed = [b for b in bits if b < 16] or bits
    low, high = min(packed), max(packed)
    assert speed(high, context) <= speed(low, context)
    assert speed(low, context + more) <= speed(low, context)
    for b in (*bits, 16):
        roof = device.memory_rate / (134_515_008 * b / 8 + context * 23_040)
        assert speed(b, context) <= roof * (1 + 1e-12)  # three roundings of 2^-53 each


@given(st.sampled_from(sorted(CPUS)), st.integers(1, 1 << 32), st.integers(0, 1 << 32))
def law_hw_gpu_cpu_time_never_falls_as_the_working_set_grows(name, small, more):
    device = DEVICES[name]
    seconds = lambda n: n / device.level_rate(device.level_of(n))
    assert seconds(small) <= seconds(small + more)
    order = ["l1", "l2", "l3", "dram"]
    assert order.index(device.level_of(small)) <= order.index(device.level_of(small + more))


def law_hw_gpu_every_number_has_a_source():
    from hw import parts

    for part in (*parts.GPUS.values(), *parts.CPUS.values(), parts.ENERGY, parts.CACHE_BYTES_PER_CYCLE):
        for field, value, source in part.rows():
            assert source, (part.title, field)
            assert value is not None, (part.title, field)


def law_hw_gpu_ridge_points_of_the_table():
    """Operations a byte at which a device turns from memory to arithmetic: 2 significant digits by hand."""
    want = {"a100": 153, "h100": 295, "h200": 206, "tpu_v5e": 241}
    got = {name: GPUS[name]().ridge() for name in want}
    assert {n: round(x) for n, x in got.items()} == want
    assert round(GPUS["t4"]().ridge("float16")) == 203
    faster = replace(GPUS["h200"](), hbm_gbps=9600.0)
    np.testing.assert_allclose(faster.ridge(), got["h200"] / 2)


def law_hw_gpu_exercises():
    """The numbers in the folded solutions of the chapter."""
    plan = lambda method, splits=None: (
        decode_estimate([384], 108, 128, a100(), method=method, num_splits=splits).makespan
    )
    assert (plan("fa2"), plan("flash_decoding", 2), plan("lean")) == (3, 4, 3)
    device = h100()
    meet = device.compute_eff * device.peak_tflops["bfloat16"] / (4 * device.sfu_tops)
    assert 47 < meet < 48
    decode = decode_estimate([65536], 8, 128, GPUS["h200"](launch_us=0.0), method="fa2")
    np.testing.assert_allclose(decode.seconds, 0.8e-3, rtol=0.02)
