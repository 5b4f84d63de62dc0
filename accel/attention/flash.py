"""FlashAttention in JAX: exact attention by tiles, the score matrix never in memory.

Query tiles outside, key tiles inside (FlashAttention-2's order, Dao 2023), the state of the running softmax
in float32 (float64 for float64 input). impl="xla" is plain JAX (accel/blocks/tiled_attention.py): it takes
every option, and may be differentiated in both modes and any number of times. "hopper", "triton" and "tpu"
are Pallas kernels: no dropout, no float64, reverse mode once; "hopper" takes half precision only.
Definitions: ref/attention/flash.py.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from accel.blocks.attention import attention_dense
from accel.blocks.backend import choose_impl, hopper_obstacle
from accel.blocks.shapes import alike, lift
from accel.blocks.softmax import SoftmaxState, finalize, merge, online_softmax
from accel.blocks.tiled_attention import Plan, Sight, tiled_attention, tiled_attention_bwd
from accel.blocks.tiles import too_wide
from accel.kernels.flash_hopper_lists import spans
from ref.attention.flash import block_sizes, check_blocks, check_segments, example, hbm_accesses
from ref.blocks.attention import check_attention
from ref.dims import dims

__all__ = [
    "SoftmaxState",
    "attention_dense",
    "block_sizes",
    "example",
    "finalize",
    "flash_attention",
    "flash_attention_bwd",
    "hbm_accesses",
    "merge",
    "online_softmax",
]

FEW = 1 << 20  # pairs, for which both kernels take some 20 µs, tables included
STATIC = ("causal", "scale", "dropout_p", "tiles", "impl", "interpret", "itself")


def flash_attention(
    q,
    k,
    v,
    *,
    mask=None,
    key_lengths=None,
    q_segment_ids=None,
    kv_segment_ids=None,
    causal=False,
    scale=None,
    block_q=128,
    block_k=128,
    dropout_mask=None,
    dropout_p=0.0,
    order="q_outer",
    return_lse=False,
    impl="auto",
    interpret=False,
):
    """softmax(scale q k^T over the visible keys) v by tiles; as ref, o in q's dtype, lse float32 (float64).

    block_q, block_k: both 128, the default, leaves the choice to impl="xla" (256 x 2048 fits a core's cache).
    q_segment_ids, kv_segment_ids: if both are one array, every token sees itself, and kernels need smaller
      tables.
    order: "q_outer"; the paper's "k_outer" exists in ref only.
    impl: "auto" is a kernel on a GPU or TPU that can run the call, else "xla".
    Raises: ValueError naming the argument; NotImplementedError for an impl that cannot run, saying why.
    """
    told = mask, key_lengths, dropout_mask, q_segment_ids, kv_segment_ids
    static = _static((q, k, v), told, causal, scale, block_q, block_k, dropout_p, impl, interpret)
    if order != "q_outer":
        raise ValueError(f'order must be "q_outer" in accel ("k_outer" is in ref), got {order!r}')
    o, lse = _flash(*map(jnp.asarray, (q, k, v)), *told, **static)
    return (o, lse) if return_lse else o


def flash_attention_bwd(
    do,
    q,
    k,
    v,
    o,
    lse,
    *,
    mask=None,
    key_lengths=None,
    q_segment_ids=None,
    kv_segment_ids=None,
    causal=False,
    scale=None,
    block_q=128,
    block_k=128,
    dropout_mask=None,
    dropout_p=0.0,
    impl="auto",
    interpret=False,
):
    """(dq, dk, dv) for the cotangent do of o, probabilities recomputed by tiles from lse; in q's, k's, v's
    dtypes.
    """
    told = mask, key_lengths, dropout_mask, q_segment_ids, kv_segment_ids
    static = _static((q, k, v), told, causal, scale, block_q, block_k, dropout_p, impl, interpret)
    rows = "... H L" if q.ndim > 2 else "L"
    like_v = (v, "... Hkv S Dv" if q.ndim > 2 else "S Dv")
    dims(q=(q, rows + " D"), v=like_v, do=(do, rows + " Dv"), o=(o, rows + " Dv"), lse=(lse, rows))
    return _flash_bwd(*map(jnp.asarray, (do, q, k, v, o, lse)), *told, **static)


def _static(arrays, told, causal, scale, block_q, block_k, dropout_p, impl, interpret):
    """The static arguments of a call, all of them checked."""
    (q, k, v), (mask, key_lengths, keep, q_ids, kv_ids) = arrays, told
    check_blocks(block_q, block_k)
    check_attention(q, k, v, mask, key_lengths, keep, dropout_p)
    check_segments(q, k, q_ids, kv_ids)
    hidden = any(x is not None for x in (mask, key_lengths, q_ids))
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    pairs = math.prod(q.shape[:-1]) * k.shape[-2] if hidden else None
    obstacle = 'has no dropout; use impl="xla"' if dropout_p > 0 else kernel_obstacle(*arrays)
    impl = choose_impl(
        impl,
        arrays=arrays,
        interpret=interpret,
        auto=[i for i in kernels(q.shape[-2], pairs) if _takes_tiles(i, block_q, block_k)],
        obstacles={
            "hopper": obstacle or no_hopper(arrays, interpret),
            "triton": obstacle or too_wide(q, v),
            "tpu": obstacle,
        },
    )
    tiles = (None, None) if impl == "xla" and (block_q, block_k) == (128, 128) else (block_q, block_k)
    return {
        "causal": bool(causal),
        "scale": scale,
        "dropout_p": float(dropout_p),
        "tiles": tiles,
        "impl": impl,
        "interpret": bool(interpret),
        "itself": q_ids is not None and q_ids is kv_ids and mask is None and key_lengths is None,
    }


def kernel_obstacle(q, k, v):
    """Why no kernel can run on queries, keys and values of these dtypes, or None."""
    q, k, v = map(jnp.result_type, (q, k, v))
    for dtype in (q, k, v):
        if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
            return f"has no {dtype}"
    return None if q == k else f"needs q and k of one dtype, got {q} and {k}"


def _takes_tiles(impl, block_q, block_k):
    """Whether a kernel has tiles of these sizes ("hopper" chooses its own)."""
    if impl == "tpu":
        return block_q % 16 == 0 and block_k % 128 == 0
    return impl == "hopper" or all(b >= 16 and b & (b - 1) == 0 for b in (block_q, block_k))


def kernels(L, pairs=None):
    """The kernels for "auto" with L queries, best first, as measured on an H200 (docs/notes/gpu.md).

    pairs: of queries and keys, over all heads, where something but causal order hides some: the tables that
    say which take Hopper up to 15 µs to make, too long below FEW pairs.
    """
    if 16 < L < 128:
        return ("triton", "tpu")
    few = pairs is not None and pairs < FEW
    return ("triton", "hopper", "tpu") if few else ("hopper", "triton", "tpu")


def no_hopper(arrays, interpret=False):
    """Why the kernel for Hopper cannot take q, k and v, or None."""
    dtypes = {jnp.result_type(x) for x in arrays}
    if interpret:
        return 'has no interpreter; use impl="triton"'
    if len(dtypes) > 1 or not dtypes <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)}:
        return f'takes bfloat16 or float16, not {", ".join(sorted(map(str, dtypes)))}; use impl="triton"'
    if max(x.shape[-1] for x in arrays) > 256:
        return 'takes heads of up to 256; use impl="triton"'
    return hopper_obstacle(arrays)


@partial(jax.jit, static_argnames=STATIC)
def _flash(
    q, k, v, mask, key_lengths, keep, q_ids, kv_ids, *, causal, scale, dropout_p, tiles, impl, interpret,
    itself,
):  # fmt: skip
    """itself: queries and keys are the same texts, of which a token sees at least itself."""
    heads = _with_heads(q, k, v)
    if impl == "hopper" and q.size and k.size:
        operands, hi, hidden = _joined(*heads, mask, key_lengths, q_ids, kv_ids, causal)
        o, lse = on_hopper(Plan(scale, None, hi, 128, 128, 0.0), How(itself=itself), *operands, hidden)
        return o.reshape(*q.shape[:-1], v.shape[-1]), lse.reshape(q.shape[:-1])
    o, lse = tiled_attention(
        *heads,
        scale=scale,
        dropout_p=dropout_p,
        block_q=tiles[0],
        block_k=tiles[1],
        kernel=kernel(impl, interpret),
        **_options(*heads[:2], _within(mask, q_ids, kv_ids), key_lengths, keep, causal),
    )
    return o.astype(q.dtype).reshape(*q.shape[:-1], v.shape[-1]), lse.reshape(q.shape[:-1])


@partial(jax.jit, static_argnames=STATIC)
def _flash_bwd(
    do,
    q,
    k,
    v,
    o,
    lse,
    mask,
    key_lengths,
    keep,
    q_ids,
    kv_ids,
    *,
    causal,
    scale,
    dropout_p,
    tiles,
    impl,
    interpret,
    itself,
):
    heads = _with_heads(do, q, k, v, o)
    if impl == "hopper" and q.size and k.size:
        (q_, k_, v_), hi, hidden = _joined(*heads[1:4], mask, key_lengths, q_ids, kv_ids, causal)
        do_, o_ = (x.reshape(*q_.shape[:3], x.shape[-1]) for x in (heads[0], heads[4]))
        plan, lse = Plan(scale, None, hi, 128, 128, 0.0), lse.reshape(q_.shape[:3])
        grads = _back_on_hopper(plan, How(itself=itself), do_, q_, k_, v_, o_, lse, hidden)
        return tuple(g.reshape(x.shape) for g, x in zip(grads, (q, k, v), strict=True))
    grads = tiled_attention_bwd(
        *heads,
        lse.reshape(heads[1].shape[:-1]),
        scale=scale,
        dropout_p=dropout_p,
        block_q=tiles[0],
        block_k=tiles[1],
        kernel=None if impl == "xla" else partial(kernel_backward, impl, interpret),
        **_options(*heads[1:3], _within(mask, q_ids, kv_ids), key_lengths, keep, causal),
    )
    return tuple(g.astype(x.dtype).reshape(x.shape) for g, x in zip(grads, (q, k, v), strict=True))


def _with_heads(*arrays):
    """[L, D] -> [1, L, D]; with heads as they are."""
    return tuple(x[None] if x.ndim == 2 else x for x in arrays)


def _within(mask, q_ids, kv_ids):
    """mask without pairs of different segments: [..., 1, L, S]. Kernels for Hopper need no such square."""
    if q_ids is None:
        return mask
    q_ids, kv_ids = jnp.asarray(q_ids)[..., None, :, None], jnp.asarray(kv_ids)[..., None, None, :]
    ndim = max(q_ids.ndim, kv_ids.ndim, 0 if mask is None else jnp.ndim(mask))
    same = lift(q_ids, ndim) == lift(kv_ids, ndim)
    return same if mask is None else same & lift(jnp.asarray(mask), ndim)


def _options(q, k, mask, key_lengths, keep, causal):
    """The visible set and dropout as `tiled_attention` takes them, for q, k with heads."""
    L, S = q.shape[-2], k.shape[-2]
    mask, keep = (None if x is None else lift(jnp.asarray(x), q.ndim) for x in (mask, keep))
    found = {"mask": mask, "keep": keep, "hi": S - L if causal else None}
    if key_lengths is None:
        return found
    end = lift(jnp.asarray(key_lengths, jnp.int32), q.ndim - 2)[..., None]  # [..., H or 1, 1]
    if causal:
        row = lift(jnp.arange(L, dtype=jnp.int32), q.ndim - 1)
        end = jnp.maximum(jnp.minimum(end, row + end - L + 1), 0)
    return {**found, "row_end": end}


def kernel(impl, interpret):
    """What `tiled_attention` takes as its kernel; None for "xla"."""
    if impl == "xla":
        return None
    return lambda plan, q, k, v, sight: _kernel(
        impl, interpret, plan, *alike((q, k, v), q, k, v, sight), sight
    )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _kernel(impl, interpret, plan: Plan, q, k, v, sight: Sight):
    """The forward kernel on the grouped layout: q [..., G, L, D], k [..., S, D] -> (o, lse)."""
    return once(_forward, impl, interpret, plan, (q, k, v), sight)


def _kernel_fwd(impl, interpret, plan, q, k, v, sight):
    o, lse = once(_forward, impl, interpret, plan, (q, k, v), sight)
    return (o, lse), (q, k, v, o, lse, sight)


def _kernel_rev(impl, interpret, plan, saved, cotangents):
    *arrays, sight = saved
    do, dlse = cotangents
    return (*kernel_backward(impl, interpret, plan, do, *arrays, sight, dlse=dlse), None)


_kernel.defvjp(_kernel_fwd, _kernel_rev)


def kernel_backward(impl, interpret, plan, do, q, k, v, o, lse, sight, dlse=None):
    """The backward kernels on the grouped layout, once differentiable: (dq, dk, dv)."""
    delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1)  # equation 4 of the paper
    if dlse is not None:
        delta = delta - jnp.where(jnp.isneginf(lse), 0, dlse)
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse)  # a row that saw nothing: exp(s - lse) = 0
    return once(_backward, impl, interpret, plan, (do, q, k, v, lse, delta), sight)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3))
def once(fn, impl, how, plan, arrays, sight):
    """fn of the same arguments, which says what is missing when asked for a derivative of its own."""
    return fn(impl, how, plan, arrays, sight)


@once.defjvp
def _no_derivative(fn, impl, how, plan, primals, tangents):
    raise NotImplementedError(
        f'impl="{impl}" is differentiable once, in reverse mode; use impl="xla" for second derivatives'
    )


def _forward(impl, interpret, plan, arrays, sight):
    lead = arrays[0].shape[:-3]
    operands, options = _flat(plan, lead, arrays, sight)
    o, lse = alike(kernel_module(impl).forward(*operands, **options, interpret=interpret), arrays, sight)
    return o.reshape(*lead, *o.shape[1:]), lse.reshape(*lead, *lse.shape[1:])


def _backward(impl, interpret, plan, arrays, sight):
    do, q, k, v, lse, delta = arrays
    lead = q.shape[:-3]
    flat = lambda x: x.reshape(-1, *x.shape[len(lead) :])
    operands, options = _flat(plan, lead, (q, k, v), sight)
    rows = flat(lse), flat(delta)
    grads = kernel_module(impl).backward(
        flat(do.astype(q.dtype)), *operands[:3], *rows, *operands[3:], **options, interpret=interpret
    )
    return alike(tuple(g.reshape(x.shape) for g, x in zip(grads, (q, k, v), strict=True)), arrays, sight)


class How(NamedTuple):
    """What is static in a call of the kernels for Hopper, beside its Plan: see `flash_hopper.attend`."""

    rows_first: bool = False
    itself: bool = False


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def on_hopper(plan, how, q, k, v, hidden):
    """(o, lse) of the kernels for Hopper, operands as in `flash_hopper.attend`; hidden: {start, end, mask},
    of which some may be missing.
    """
    return once(_hopper, "hopper", how, plan, (q, k, v), hidden)


def _on_hopper_fwd(plan, how, q, k, v, hidden):
    o, lse = once(_hopper, "hopper", how, plan, (q, k, v), hidden)
    return (o, lse), (q, k, v, o, lse, hidden)


def _on_hopper_rev(plan, how, saved, cotangents):
    do, dlse = cotangents
    return *_back_on_hopper(plan, how, do, *saved, dlse=dlse), None


on_hopper.defvjp(_on_hopper_fwd, _on_hopper_rev)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def on_hopper_biased(plan, how, q, k, v, bias, hidden):
    """As `on_hopper`, with a bias in q's dtype; only where that is differentiated is its gradient made."""
    return once(_hopper, "hopper", how, plan, (q, k, v), {**hidden, "bias": bias})


def _on_hopper_biased_fwd(plan, how, *given):
    told = lambda x: isinstance(x, CustomVJPPrimal)
    q, k, v, bias, hidden = jax.tree.map(lambda x: x.value, given, is_leaf=told)
    hidden = {**hidden, "bias": bias}
    o, lse = once(_hopper, "hopper", how, plan, (q, k, v), hidden)
    learnt = jnp.zeros(int(given[3].perturbed), bool)  # its length tells: JAX may mix up trees of two traces
    return (o, lse), (q, k, v, o, lse, hidden, learnt)


def _on_hopper_biased_rev(plan, how, saved, cotangents):
    *saved, learnt = saved
    do, dlse = (None if isinstance(x, SymbolicZero) else x for x in cotangents)
    do = jnp.zeros_like(saved[3]) if do is None else do
    back = _hopper_backward_learnt if learnt.size else _hopper_backward
    grads = _back_on_hopper(plan, how, do, *saved, dlse=dlse, back=back)
    return *grads[:3], grads[3] if learnt.size else None, None


on_hopper_biased.defvjp(_on_hopper_biased_fwd, _on_hopper_biased_rev, symbolic_zeros=True)


def _back_on_hopper(plan, how, do, q, k, v, o, lse, hidden, dlse=None, back=None):
    """(dq, dk, dv) by the kernels for Hopper, once differentiable."""
    delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1)
    delta = jnp.moveaxis(delta, 1, 2) if how.rows_first else delta
    if dlse is not None:
        delta = delta - jnp.where(jnp.isneginf(lse), 0, dlse)
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse)
    arrays = do.astype(q.dtype), q, k, v, lse, delta
    return once(back or _hopper_backward, "hopper", how, plan, arrays, hidden)


def _hopper(impl, how, plan, arrays, hidden):
    options = {"scale": plan.scale, "lo": plan.lo, "hi": plan.hi, **how._asdict()}
    return alike(kernel_module(impl).attend(*arrays, **hidden, **options), arrays, hidden)


def _hopper_backward(impl, how, plan, arrays, hidden, **more):
    options = {"scale": plan.scale, "lo": plan.lo, "hi": plan.hi, **how._asdict(), **more}
    return alike(kernel_module(impl).attend_backward(*arrays, **hidden, **options), arrays, hidden)


_hopper_backward_learnt = partial(_hopper_backward, learnt=True)


def _joined(q, k, v, mask, key_lengths, q_ids, kv_ids, causal):
    """((q, k, v), hi, {start, end, mask}) as `flash_hopper.attend` takes them: one leading axis, axes of 1
    kept.
    """
    told = _options(q, k, mask, key_lengths, None, causal)
    lead, (L, S) = q.shape[:-3], (q.shape[-2], k.shape[-2])

    def joined(x, axes):
        own = lead if math.prod(x.shape[:-axes]) > 1 else x.shape[:-axes]
        return jnp.broadcast_to(x, (*own, *x.shape[-axes:])).reshape(math.prod(own), *x.shape[-axes:])

    hidden = {}
    if (end := told.get("row_end")) is not None:
        hidden["end"] = joined(end, 2)
    elif causal and L > S:  # rows that see nothing, whatever they hold
        hidden["end"] = jnp.full((1, 1, 1), S, jnp.int32)
    if (mask := told["mask"]) is not None:
        hidden["mask"] = joined(jnp.broadcast_to(mask, (*mask.shape[:-1], S)), 3)
    if q_ids is not None:  # a run of keys for every query
        ids, others = (joined(lift(jnp.asarray(x), q.ndim - 2), 1) for x in (q_ids, kv_ids))
        hidden["start"], last = (x[:, None] for x in spans(ids, others))
        hidden["end"] = jnp.minimum(last, hidden["end"]) if "end" in hidden else last
    q, k, v = (x.reshape(math.prod(lead), *x.shape[-3:]) for x in (q, k, v))
    return alike((q, k, v), q, k, v, hidden), told["hi"], hidden


def kernel_module(impl):
    """The kernels' module, imported when first needed."""
    if impl == "hopper":
        from accel.kernels import flash_hopper as module
    elif impl == "triton":
        from accel.kernels import flash_triton as module
    else:
        from accel.kernels import flash_tpu as module
    return module


def _flat(plan, lead, arrays, sight):
    """Operands with one leading axis and the options of a kernel: ([q, k, v, end, mask], {...})."""
    q, k, v = (x.reshape(-1, *x.shape[len(lead) :]) for x in arrays)
    (B, G, L), S = q.shape[:3], k.shape[1]
    end = mask = None
    if sight.row_end is not None:
        end = jnp.broadcast_to(sight.row_end, (*lead, G, L)).reshape(B, G, L)
    if sight.mask is not None:
        mask = jnp.broadcast_to(sight.mask, (*sight.mask.shape[:-1], S)).astype(jnp.int8)
        one = all(n == 1 for n in mask.shape[: len(lead)])
        mask = jnp.broadcast_to(mask, (*((1,) * len(lead) if one else lead), *mask.shape[-3:]))
        mask = mask.reshape(-1, *mask.shape[-3:])
    options = {"scale": plan.scale, "lo": plan.lo, "hi": plan.hi}
    return [q, k, v, end, mask], {**options, "block_q": plan.block_q, "block_k": plan.block_k}
