"""Arrays in parts on eight devices under plain `jit`: what XLA makes of our functions sends what it must.

Batches and heads need no exchange at all; a tensor-parallel block (Shoeybi et al. 2019, section 3: columns,
then rows) one sum a sublayer; replicated weights the sum of their gradients. Nothing is ever gathered. The
collectives are read from the compiled program. Inside `shard_map` nothing is exchanged but by name:
tests/test_layers.py runs every example there, the tests below what has a gradient rule of its own.
"""

import importlib
import re
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import accel
from accel.blocks.quantize import lsq_quantize
from accel.blocks.transformer import transformer_block
from accel.models import gpt
from ref.blocks.transformer import BlockParams, init_block
from tests.lower import lowered

DEVICES = 8
MESH = jax.make_mesh(
    (DEVICES,), ("parts",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu")[:DEVICES]
)
KINDS = r"(all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter)(?:-start)?\("
EPS = 2.0**-23


def spec(*axes):
    return NamedSharding(MESH, P(*axes))


ALL, FIRST = spec(), spec("parts")


def compiled(fn, args, shardings, out):
    """(the compiled program, {collective: how many})."""
    program = jax.jit(fn, in_shardings=shardings, out_shardings=out).lower(*args).compile()
    return program, Counter(re.findall(rf" {KINDS}", program.as_text()))


def drawn(*shape, seed=0):
    return jax.device_put(np.float32(np.random.default_rng(seed).standard_normal(shape)))


def close(got, want, terms):
    """Sums of so many products of normal numbers in another order; each leaf by its largest entry."""
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        g, w = np.asarray(g), np.asarray(w)
        np.testing.assert_allclose(g, w, rtol=0, atol=terms * EPS * max(1.0, np.abs(w).max()))


TILES = np.tri(4, 4, dtype=bool)
ATTENTION = {
    "flash": partial(accel.flash.flash_attention, causal=True),
    "block_sparse_flash": lambda q, k, v: accel.block_sparse_flash.block_sparse_attention(
        q, k, v, TILES, block_q=4, block_k=4
    ),
}


@pytest.mark.parametrize(("slug", "axis"), [("flash", "heads"), ("block_sparse_flash", "batch")])
def test_sharding_of_attention_needs_no_exchange(slug, axis):
    """Values and gradients; the list of tiles names heads, so heads in parts need a `shard_map` there."""
    cut = FIRST if axis == "batch" else spec(None, "parts")
    args = [drawn(DEVICES, DEVICES, 16, 8, seed=s) for s in range(4)]

    def both(q, k, v, do):
        o, pull = jax.vjp(ATTENTION[slug], q, k, v)
        return o, *pull(do)

    program, sent = compiled(both, args, (cut,) * 4, (cut,) * 4)
    assert not sent
    close(program(*args), jax.jit(both)(*args), 16 * 8)


def test_lean_sharding_by_heads_needs_no_exchange():
    cut = spec(None, "parts")
    q, k, v = drawn(DEVICES, DEVICES, 8), *(drawn(DEVICES, DEVICES, 16, 8, seed=s) for s in (1, 2))
    decode = lambda q, k, v: accel.lean.lean_attention(q, k, v, lengths=jnp.full(DEVICES, 11, jnp.int32))
    program, sent = compiled(decode, (q, k, v), (cut,) * 3, cut)
    assert not sent
    close(program(q, k, v), jax.jit(decode)(q, k, v), 16 * 8)


def test_sharding_of_the_drop_in_by_heads_needs_no_exchange():
    cut = spec(None, None, "parts")
    args = [drawn(DEVICES, 16, DEVICES, 8, seed=s) for s in range(3)]
    attend = partial(accel.dot_product_attention, is_causal=True, local_window_size=(5, 0))
    program, sent = compiled(attend, args, (cut,) * 3, cut)
    assert not sent
    close(program(*args), jax.jit(attend)(*args), 16 * 8)


# --8<-- [start:columns]
def by_columns_then_rows(leaf=spec):
    """Shardings of a block: heads and hidden units in parts."""
    column, row, vector, whole = leaf(None, "parts"), leaf("parts", None), leaf("parts"), leaf()
    maps = {f"w_{n}": column for n in ("q", "k", "v", "fc1")} | {"w_o": row, "w_fc2": row}
    biases = {f"b_{n}": vector for n in ("q", "k", "v", "fc1")} | {"b_o": whole, "b_fc2": whole}
    norms = {f"ln{n}_{x}": whole for n in (1, 2) for x in ("scale", "bias")}
    return BlockParams(**maps, **biases, **norms)
    # --8<-- [end:columns]


def block(x, params):
    return transformer_block(x, params, num_heads=DEVICES, causal=True, attention=accel.flash.flash_attention)


def block_and_gradients(x, params, cotangent):
    y, pull = jax.vjp(block, x, params)
    return y, *pull(cotangent)


@pytest.fixture(scope="module")
def one():
    """(arguments of `block_and_gradients`, its result on one device)."""
    width = 4 * DEVICES
    params = jax.tree.map(jnp.float32, init_block(np.random.default_rng(0), width, 4 * width))
    args = drawn(DEVICES, 6, width), params, drawn(DEVICES, 6, width, seed=1)
    return args, jax.jit(block_and_gradients)(*args)


def test_sharding_of_a_block_by_heads_sums_once_a_sublayer(one):
    """Forward one sum after attention and one after the MLP; backward the same for the input's gradient."""
    args, want = one
    weights = by_columns_then_rows()
    program, sent = compiled(block_and_gradients, args, (ALL, weights, ALL), (ALL, ALL, weights))
    assert set(sent) == {"all-reduce"}
    _, forward = compiled(block, args[:2], (ALL, weights), ALL)
    assert forward == {"all-reduce": 2}
    close(program(*args), want, 4 * 32 * 48)


def test_sharding_of_batches_sums_gradients_of_weights_alone(one):
    args, want = one
    weights = jax.tree.map(lambda _: ALL, args[1])
    program, sent = compiled(block_and_gradients, args, (FIRST, weights, FIRST), (FIRST, FIRST, weights))
    assert set(sent) == {"all-reduce"}
    close(program(*args), want, 4 * 32 * 48)
    _, forward = compiled(block, args[:2], (FIRST, weights), FIRST)
    assert not forward


def test_sharding_of_a_network_over_batches_and_heads():
    """GPT on 2 x 4 devices: batches over the first axis, heads and vocabulary over the second."""
    mesh = jax.make_mesh(
        (2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices("cpu")[:DEVICES]
    )
    leaf = lambda *axes: NamedSharding(mesh, P(*("model" if a else None for a in axes)))
    drawn_ = gpt.init_gpt(np.random.default_rng(0), vocab=16, context=6, dim=16, depth=2)
    params = jax.tree.map(jnp.float32, drawn_)
    whole = jax.tree.map(lambda _: leaf(), params)
    weights = whole._replace(blocks=(by_columns_then_rows(leaf),) * 2)
    ids = jnp.asarray(np.random.default_rng(1).integers(0, 16, (4, 6)), jnp.int32)
    rows = NamedSharding(mesh, P("data"))
    run = partial(gpt.gpt_forward, num_heads=4, attention=accel.flash.flash_attention)
    program, sent = compiled(run, (ids, params), (rows, weights), rows)
    assert sent == {"all-reduce": 4}  # two sums a block, among the four that share a batch
    close(program(ids, params), jax.jit(run)(ids, params), 4 * 16 * 64)


def test_llm_int8_sharding_by_columns_needs_no_exchange():
    """Outputs in parts: each device has its rows of W and their scales; x, and its outliers, on all."""
    rng = np.random.default_rng(0)
    x = drawn(6, 16).at[:, 3].multiply(20)
    layer = accel.llm_int8.convert_linear(rng.standard_normal((4 * DEVICES, 16)), np.zeros(4 * DEVICES))
    layer = jax.tree.map(jnp.asarray, layer)
    cut = layer._replace(w_q=spec("parts"), w_absmax=FIRST, bias=FIRST)
    run = partial(accel.llm_int8.llm_int8_linear, max_outliers=4)
    program, sent = compiled(run, (x, layer), (ALL, cut), spec(None, "parts"))
    assert not sent
    close(program(x, layer), jax.jit(run)(x, layer), 16)


def summed(fn, x, params, mesh=MESH):
    """(dx, dparams) of sums of fn(x[n : n + 1], params), x in parts and params everywhere: added up from one
    device's, and as those of a mesh in a `shard_map` have them, with the collectives.
    """
    grads = gradients(fn)
    program = jax.jit(over(grads, mesh)).lower(x, params).compile()
    alone = jax.jit(grads)
    each = [jax.device_get(alone(part, params)) for part in np.split(np.asarray(x), mesh.size)]
    want = np.concatenate([e[0] for e in each]), jax.tree.map(lambda *g: sum(g), *[e[1] for e in each])
    return want, program(x, params), set(re.findall(KINDS, program.as_text()))


def gradients(fn):
    return jax.grad(lambda x, p: jnp.sum(jnp.sin(fn(x, p))), argnums=(0, 1))


def over(grads, mesh):
    """`grads` in a `shard_map` that checks what varies, which is the default."""
    return jax.shard_map(grads, mesh=mesh, in_specs=(P("parts"), P()), out_specs=(P("parts"), P()))


def sparse(x, p, **options):
    """Tiles of 4 x 4, or one that a kernel takes."""
    tiles, blocks = (np.ones((1, 1), bool), (16, 128)) if options else (TILES[:2, :2], (4, 4))
    sizes = dict(zip(("block_q", "block_k"), blocks, strict=True))
    return accel.block_sparse_flash.block_sparse_attention(x[0], *p, tiles, **sizes, **options)


def int8(x, p, **options):
    fixed = np.random.default_rng(0).standard_normal((6, 16))
    layer = accel.llm_int8.convert_linear(fixed, np.zeros(6))
    layer = layer._replace(w_absmax=jnp.float32(layer.w_absmax), bias=p[0], float_weight=p[1])
    return accel.llm_int8.llm_int8_linear(3 * x, layer, max_outliers=4, **options)


def experts(x, p, **options):
    """Three tokens a device, each to two of three experts."""
    return accel.edge_moe.moe_ffn(x[0], jnp.int32([[0, 1], [1, 2], [2, 0]]), p[4], *p[:4], **options)


def turned(x, p, **options):
    params = jax.tree.map(jnp.float32, accel.rum.init_rum(np.random.default_rng(0), 4, 8))
    return accel.rum.rum(x, params._replace(W_e=p[0]), lambda_=1, **options)[0]


def stored(x, p, **options):
    """Four layers that store what they read rounded, ranges of each device's own."""
    state, two = accel.mesa.init_range((2,)), {"groups": 2}
    y = accel.mesa.mesa_linear(x, p[0], p[1], state, **two)[0]
    y = accel.mesa.mesa_gelu(y, state, **two, **options)[0]
    y = accel.mesa.mesa_layer_norm(y, p[2], p[3], state, **two)[0]
    one = accel.mesa.init_range((1,))
    return accel.mesa.mesa_matmul(y[:, None], p[4][None, None], one, one, groups=1)[0]


# (function of x and weights, shape of x, shapes of the weights)
RULES = {
    "edge_moe": (experts, (8, 3, 4), [(3, 6, 4), (3, 6), (3, 4, 6), (3, 4), (3, 2)]),
    "flash": (
        lambda x, p, **o: accel.flash.flash_attention(x[0], *p, causal=True, **o),
        (8, 2, 6, 4), 2 * [(2, 6, 4)],
    ),
    "block_sparse_flash": (sparse, (8, 2, 8, 4), 2 * [(2, 8, 4)]),
    "lean": (lambda x, p, **o: accel.lean.lean_attention(x, *p, **o), (8, 2, 4), 2 * [(1, 2, 6, 4)]),
    "llm_int8": (int8, (8, 16), [(6,), (6, 16)]),
    "mesa": (stored, (8, 3, 4), [(4, 6), (6,), (6,), (6,), (6, 5)]),
    "learned step": (lambda x, p: lsq_quantize(x, p[0], qmin=-8, qmax=7), (8, 5), [()]),
    "pitome": (
        lambda x, p, **o: accel.pitome.energy_score(x * p[0][None, None], margin=0.3, **o),
        (8, 6, 4), [(4,)],
    ),
    "rum": (turned, (8, 5, 4), [(4, 8)]),
}  # fmt: skip
if jax.__version_info__ >= (0, 12):
    del RULES["edge_moe"]  # GELU's slope: the derivative of its erf fails JAX's own check


def example_of(slug):
    """(function, x, weights) of a rule."""
    fn, shape, shapes = RULES[slug]
    return fn, drawn(*shape), [drawn(*s, seed=i + 1) for i, s in enumerate(shapes)]


@pytest.mark.parametrize("slug", RULES)
def test_sharding_sums_gradients_of_replicated_arrays(slug):
    """A gradient rule of our own, weights counted as equal on all devices, checked by JAX (check_vma)."""
    want, got, sent = summed(*example_of(slug))
    assert sent == {"all-reduce"}
    close(got, want, 8 * 6 * 8)


KERNELS = [
    slug
    for slug in ("block_sparse_flash", "edge_moe", "flash", "lean", "llm_int8", "mesa", "pitome", "rum")
    if slug in RULES
]


@pytest.mark.parametrize("impl", ["triton", "tpu"])
@pytest.mark.parametrize("slug", KERNELS)
def test_sharding_of_a_kernel_passes_the_check_of_what_varies(slug, impl):
    """Traced, not run: Pallas's interpreter itself fails the check; the test below runs on GPUs."""
    fn, *args = example_of(slug)
    grads = over(gradients(partial(fn, impl=impl, interpret=True)), MESH)
    program = str(jax.make_jaxpr(grads)(*args))
    assert "pallas_call" in program
    assert "psum_invariant" in program  # the sum that the rule's gradient of the weights needs


@pytest.mark.parametrize(("platform", "impl"), [("cuda", "triton"), ("tpu", "tpu")])
def test_edge_moe_sharding_of_a_checked_kernel_compiles(platform, impl):
    """Down to the device's language, inside a `shard_map`: rows in parts, weights on all devices."""
    linear = importlib.import_module(f"accel.kernels.edge_moe_{impl}").grouped_linear
    specs = P("x"), P(), P(), P("x"), P("x")
    shapes = ((64, 128), jnp.float32), ((2, 128, 128), jnp.float32), ((2, 128), jnp.float32)
    args = [jax.ShapeDtypeStruct(*s) for s in (*shapes, *[((2,), jnp.int32)] * 2)]
    lowered(jax.shard_map(linear, in_specs=specs, out_specs=P("x")), args, platform)


@pytest.mark.gpu
@pytest.mark.parametrize("slug", KERNELS)
def test_sharding_sums_gradients_of_kernels_on_gpus(slug):
    """On as many GPUs as there are, up to eight: powers of two, so that they share x evenly."""
    found = jax.devices("gpu")[:DEVICES]
    parts = 2 ** (len(found).bit_length() - 1)
    mesh = jax.make_mesh((parts,), ("parts",), axis_types=(AxisType.Auto,), devices=found[:parts])
    fn, x, params = example_of(slug)
    with jax.default_matmul_precision("highest"):
        want, got, sent = summed(partial(fn, impl="triton"), x[:parts], params, mesh)
    assert sent <= {"all-reduce"}  # one GPU has nobody to send to
    close(got, want, 8 * 6 * 8)
