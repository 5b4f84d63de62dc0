"""`triptych bench flash`, `block_sparse_flash`, `lean`: attention with its peers, in JAX's layout B N H D.

What is exact is ref's, in float64, for random rows of random heads: a few rows against all their keys cost
little at any length. Gradients are checked with a cotangent that is zero in all other rows, which makes those
of keys and values exact too.
"""

import inspect
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache, cached_property, partial

import numpy as np

from hw.commands.bench_problem import (
    Call,
    Problem,
    apart,
    drawn,
    entry,
    from_torch,
    needs_gpu,
    package,
    to_torch,
    tolerance,
    torch_device,
    wide,
)

IMPLS = ("auto", "xla", "hopper", "triton", "tpu")
ROWS = 64  # of a head that are checked
MOST_KEYS = 2**25  # numbers of keys that the check reads: heads are drawn up to that
MOST_SCORES = 2**33  # bytes of scores that a dense form may write


@dataclass(frozen=True)
class Attention:
    """One call: sizes, what hides keys, inputs drawn with `seed`.

    window: queries see keys up to so far to either side (with causal: to the left). tiles: bool
    [N / block, S / block], which tiles are visible.
    """

    shape: tuple[int, int, int, int]
    dtype: str
    backward: bool = False
    causal: bool = False
    kv_heads: int = 0
    window: int = 0
    tiles: np.ndarray | None = field(default=None, compare=False)
    block: int = 128
    seed: int = 0

    @cached_property
    def arrays(self):
        """{q, k, v, do, checked do} on JAX's device, [B, N, H, D]; the last is 0 in rows not checked."""
        import jax.numpy as jnp

        B, N, H, D = self.shape
        kv = (B, N, self.kv_heads or H, D)
        names = ("q", "k", "v", "do")[: 4 if self.backward else 3]
        found = drawn(self.seed, self.dtype, *({"k": kv, "v": kv}.get(n, self.shape) for n in names))
        found = dict(zip(names, found, strict=True))
        if self.backward:
            rows = np.zeros((1, N, 1, 1), bool)
            rows[:, self.rows] = True
            found["checked do"] = jnp.where(rows, found["do"], jnp.zeros((), found["do"].dtype))
        return found

    @cached_property
    def rows(self):
        """Sorted random rows, the first and the last among them."""
        N = self.shape[1]
        inner = np.random.default_rng(self.seed + 1).permutation(N)[: min(ROWS, N)]
        return np.unique([0, N - 1, *inner])

    @cached_property
    def heads(self):
        """Random (batch, key head) pairs."""
        B, N, H, D = self.shape
        heads = self.kv_heads or H
        count = max(1, min(B * heads, MOST_KEYS // (N * D)))
        drawn = np.random.default_rng(self.seed + 2).permutation(B * heads)[:count]
        return [divmod(int(i), heads) for i in drawn]

    def visible(self, rows):
        """bool [rows, S]."""
        N = self.shape[1]
        i, j = rows[:, None], np.arange(N)[None]
        seen = np.ones((len(rows), N), bool)
        if self.causal:
            seen &= j <= i
        if self.window:
            seen &= np.abs(i - j) <= self.window
        if self.tiles is not None:
            seen &= self.tiles[rows // self.block].repeat(self.block, axis=1)[:, :N]
        return seen

    @cached_property
    def pairs(self):
        """How many pairs of query and key a head sees."""
        N = self.shape[1]
        if self.tiles is not None:
            return sum(int(self.visible(np.arange(a, min(a + 512, N))).sum()) for a in range(0, N, 512))
        i, reach = np.arange(N), self.window or N
        last = i if self.causal else np.minimum(i + reach, N - 1)
        return int((last - np.maximum(i - reach, 0) + 1).sum())

    @cached_property
    def exact(self):
        """Per checked head what is exact, in float64: (o,), or (dq, dk, dv)."""
        from ref.attention.flash import flash_attention, flash_attention_bwd

        mask = self.visible(self.rows)
        x = {n: self._checked(a) for n, a in self.arrays.items() if n != "checked do"}
        x |= {n: x[n][:, :, self.rows] for n in ("q", "do") if n in x}

        def head(i):
            q, k, v = (wide(x[n][i]) for n in ("q", "k", "v"))
            o, lse = flash_attention(q, k, v, mask=mask, block_q=64, block_k=2048, return_lse=True)
            if not self.backward:
                return (o,)
            do = wide(x["do"][i])
            return tuple(flash_attention_bwd(do, q, k, v, o, lse, mask=mask, block_q=64, block_k=2048))

        return [head(i) for i in range(len(self.heads))]  # threads would wait for one another's memory

    @cached_property
    def _placed(self):
        return {}

    def on(self, name, dtype=None):
        """An array, in another dtype if one is named; the same for all entries."""
        import jax.numpy as jnp

        if (name, dtype) not in self._placed:
            self._placed[name, dtype] = jnp.asarray(self.arrays[name], dtype and getattr(jnp, dtype))
        return self._placed[name, dtype]

    def _checked(self, x, convert=np.asarray):
        """The heads of x [B, N, H, D] that go with the checked key heads: [checked, G, N, D]. No other comes
        to the host (convert).
        """
        b, h = np.transpose(self.heads)
        x = x.reshape(*x.shape[:2], self.kv_heads or self.shape[2], -1, x.shape[3])
        return np.moveaxis(convert(x[b, :, h]), 2, 1)

    def error(self, out, convert=np.asarray):
        """Relative error of o, or of (dq, dk, dv), each [B, N, H, D], of the worst head that is checked."""
        got = [self._checked(x, convert) for x in (out if isinstance(out, tuple | list) else (out,))]
        got[0] = got[0][:, :, self.rows]
        return np.max([apart(mine, exact) for *mine, exact in zip(*got, self.exact, strict=True)])

    @property
    def flops(self):
        """Useful operations: two products forward, five more backward, over visible pairs."""
        B, _, H, D = self.shape
        return 4 * B * H * D * self.pairs * (3.5 if self.backward else 1)

    @property
    def nbytes(self):
        """q, k, v, o once; with gradients also do, dq, dk, dv, and q, k, v, o read again."""
        B, N, H, D = self.shape
        once = 2 * B * N * D * (H + (self.kv_heads or H)) * self.arrays["q"].dtype.itemsize
        return once * (3 if self.backward else 1)

    def plain(self, what):
        """Raises: NotImplementedError if a peer without windows and masks was asked for one."""
        if self.window or self.tiles is not None:
            raise NotImplementedError(f"{what} has no {'window' if self.window else 'block mask'}")


def jax_call(a, attend, dtype=None, *, scaled=False):
    """The `Call` of a function of q, k, v [B, N, H, D], with its gradients if the problem asks.

    scaled: it multiplies scores by nothing, so its queries are scaled beforehand.
    """
    import jax
    import jax.numpy as jnp

    on = lambda n: a.on(n, dtype)
    args, error = [on(n) for n in ("q", "k", "v")], a.error
    if scaled:
        factor = a.shape[-1] ** -0.5
        args[0] = args[0] * jnp.asarray(factor, args[0].dtype)
        if a.backward:
            error = lambda out: a.error((out[0].astype(jnp.float32) * jnp.float32(factor), *out[1:]))
    options = {"error": error, "bound": tolerance(dtype or a.dtype)}
    if dtype:
        options["bound"] += tolerance(a.dtype)  # the inputs are rounded again
    if not a.backward:
        return entry(attend, *args, **options)
    both = lambda q, k, v, do: jax.vjp(attend, q, k, v)[1](do)
    return entry(both, *args, on("do"), check=(*args, on("checked do")), **options)


def torch_call(a, attend, order=(0, 2, 1, 3)):
    """The same of PyTorch, tensors in `order` (B H N D by default), outputs in that order too."""
    torch = torch_device()[0]
    q, k, v = (to_torch(a.arrays[n], order=order, grad=a.backward) for n in ("q", "k", "v"))
    first = lambda o: o[0] if isinstance(o, tuple) else o
    back = np.argsort(order).tolist() if order else [0, 1, 2, 3]
    each = lambda out: out if isinstance(out, tuple) else (out,)
    error = lambda out: a.error([x.permute(back) for x in each(out)], from_torch)
    if not a.backward:

        def run():
            with torch.no_grad():
                return first(attend(q, k, v))

        return Call(run, error, tolerance(a.dtype))
    grads = {n: to_torch(a.arrays[n], order=order) for n in ("do", "checked do")}
    run = lambda n: torch.autograd.grad(first(attend(q, k, v)), (q, k, v), grads[n])
    return Call(lambda: run("do"), error, tolerance(a.dtype), lambda: run("checked do"))


# ---- entries


def ours(a):
    """{name: maker} of `accel.dot_product_attention`, or of `block_sparse_attention` for tiles."""
    import jax.numpy as jnp

    import accel

    def dense(impl):
        window = {"local_window_size": (a.window, 0 if a.causal else a.window)} if a.window else {}
        return jax_call(
            a,
            lambda q, k, v: accel.dot_product_attention(
                q, k, v, is_causal=a.causal, implementation=impl, **window
            ),
        )

    def sparse(impl):
        swap = lambda x: jnp.moveaxis(x, -3, -2)

        def attend(q, k, v):
            o = accel.block_sparse_flash.block_sparse_attention(
                *map(swap, (q, k, v)), a.tiles, block_q=a.block, block_k=a.block, causal=a.causal, impl=impl
            )
            return swap(o)

        return jax_call(a, attend)

    make = dense if a.tiles is None else sparse
    found = {f"accel ({impl})": partial(make, impl) for impl in IMPLS}
    return found


def peers(a):
    """{name: maker} of other people's attention, as far as it is known here; each says why it cannot run."""
    found = {f"jax.nn {n}": partial(_jax_nn, a, n) for n in ("cudnn", "xla")}
    found |= {f"tokamax {n}": partial(_tokamax, a, n) for n in ("mosaic", "triton")}
    found["jax pallas mosaic gpu, float16"] = partial(_pallas_mosaic, a)
    found["jax pallas triton"] = partial(_pallas_triton, a)
    found["jax pallas tpu"] = partial(_pallas_tpu, a)
    found |= {f"torch sdpa {n}": partial(_torch_sdpa, a, n) for n in ("cudnn", "flash", "default")}
    found["torch flex_attention"] = partial(_flex, a)
    found |= {n: partial(_flash_attn, a, n) for n in FLASH_ATTN}
    found["fla parallel_attn"] = partial(_fla, a)
    return found


def _jax_nn(a, implementation):
    import jax
    import jax.numpy as jnp

    B, N, H, _ = a.shape
    if implementation == "xla" and 4 * B * H * N * N > MOST_SCORES:
        raise MemoryError(f"its scores would take {4 * B * H * N * N / 1e9:.0f} GB")
    options = {"is_causal": a.causal, "implementation": implementation}
    if a.window:
        options["local_window_size"] = (a.window, 0 if a.causal else a.window)
    if a.tiles is not None:
        options["mask"] = jnp.asarray(a.visible(np.arange(N)))[None, None]
    return jax_call(a, lambda q, k, v: jax.nn.dot_product_attention(q, k, v, **options))


def _tokamax(a, implementation):
    tokamax = package("tokamax", "tokamax")
    a.plain("this call of it")
    return jax_call(
        a,
        lambda q, k, v: tokamax.dot_product_attention(
            q, k, v, is_causal=a.causal, implementation=implementation
        ),
    )


def _on(backend):
    """Raises: RuntimeError if JAX runs elsewhere."""
    import jax

    if jax.default_backend() != backend:
        raise RuntimeError(f"needs a {backend.upper()}, and JAX runs on {jax.default_backend()}")


def _pallas_mosaic(a):
    _on("gpu")
    m = package("jax.experimental.pallas.ops.gpu.attention_mgpu", "this kernel of JAX's")
    a.plain("it")
    D = a.shape[-1]
    options = {
        "block_q": 64,
        "block_kv": 128 if D == 128 else 256,
        "max_concurrent_steps": 2,
        "causal": a.causal,
    }
    if a.backward:
        options |= {"block_q_dkv": 64, "block_kv_dkv": 64, "block_q_dq": 64, "block_kv_dq": 64}
    config = m.TuningConfig(use_schedule_barrier=True, **options)
    return jax_call(a, lambda q, k, v: m.attention(q, k, v, config), dtype="float16", scaled=True)


def _pallas_triton(a):
    _on("gpu")
    m = package("jax.experimental.pallas.ops.gpu.attention", "this kernel of JAX's")
    a.plain("it")
    scale = a.shape[-1] ** -0.5
    return jax_call(a, lambda q, k, v: m.mha(q, k, v, segment_ids=None, sm_scale=scale, causal=a.causal))


def _pallas_tpu(a):
    import jax.numpy as jnp

    _on("tpu")
    m = package("jax.experimental.pallas.ops.tpu.flash_attention", "this kernel of JAX's")
    a.plain("it")
    scale, swap = a.shape[-1] ** -0.5, lambda x: jnp.moveaxis(x, 1, 2)
    return jax_call(
        a, lambda q, k, v: swap(m.flash_attention(swap(q), swap(k), swap(v), causal=a.causal, sm_scale=scale))
    )


def _torch_sdpa(a, backend):
    torch = torch_device()[0]
    a.plain("it")
    attend = partial(
        torch.nn.functional.scaled_dot_product_attention,
        is_causal=a.causal, enable_gqa=bool(a.kv_heads) and a.kv_heads != a.shape[2],
    )  # fmt: skip
    chosen = sdpa_by(backend)

    def run(q, k, v):
        with chosen():
            return attend(q, k, v)

    return torch_call(a, run)


def sdpa_by(backend):
    """A context manager's maker: in it PyTorch's attention runs by "cudnn", by "flash" or, "default", as it
    likes.
    """
    torch_device()
    if backend == "default":
        return nullcontext
    needs_gpu()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    which = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}[backend]
    return partial(sdpa_kernel, [which])


def _flex(a):
    torch, device = torch_device()
    needs_gpu()
    m = package("torch.nn.attention.flex_attention", "flex_attention")
    N = a.shape[1]
    tiles = None if a.tiles is None else torch.from_numpy(a.tiles).to(device)

    def seen(b, h, i, j):
        found = i >= 0
        if a.causal:
            found = found & (j <= i)
        if a.window:
            found = found & ((i - j).abs() <= a.window)
        return found if tiles is None else found & tiles[i // a.block, j // a.block]

    hidden = a.causal or a.window or tiles is not None
    mask = m.create_block_mask(seen, None, None, N, N, device=device) if hidden else None
    attend = torch.compile(m.flex_attention, dynamic=False)
    gqa = bool(a.kv_heads) and a.kv_heads != a.shape[2]
    return torch_call(a, lambda q, k, v: attend(q, k, v, block_mask=mask, enable_gqa=gqa))


FLASH_ATTN = {
    "flash-attn CuTe": "flash_attn.cute",
    "flash-attn 3": "flash_attn_interface",
    "flash-attn 2": "flash_attn",
}


def _flash_attn(a, name):
    m = package(FLASH_ATTN[name], name)
    needs_gpu()
    if a.tiles is not None:
        raise NotImplementedError("it has no block mask")
    window = {"window_size": (a.window, 0 if a.causal else a.window)} if a.window else {}
    return torch_call(a, lambda q, k, v: m.flash_attn_func(q, k, v, causal=a.causal, **window), order=None)


def _fla(a):
    m = package("fla.ops.attn", "flash-linear-attention")
    needs_gpu()
    a.plain("it")
    if not a.causal:
        raise NotImplementedError("it is causal only")
    return torch_call(a, lambda q, k, v: m.parallel_attn(q, k, v), order=None)


# ---- problems


def flash(shape, *, dtype, seed, backward=False, causal=False, kv_heads=0, window=0):
    """Shape B x N x H x D. causal; kv_heads: of keys and values; window: keys to either side."""
    B, N, H, D = _four("flash", shape)
    _check_heads(H, kv_heads)
    a = Attention((B, N, H, D), dtype, backward, bool(causal), int(kv_heads), int(window), seed=seed)
    return _problem(a, [f"window of {window}"] if window else [])


def block_sparse_flash(
    shape, *, dtype, seed, backward=False, causal=False, mask="window", window=256, density=0.25, block=128
):
    """Shape B x N x H x D. mask: "window" (of `window` keys to either side), "butterfly", or "random", of
    `density`, in tiles of `block`.
    """
    from ref.attention.block_sparse_flash import butterfly_block_mask, random_block_mask

    B, N, H, D = _four("block_sparse_flash", shape)
    if mask == "window":
        return flash(shape, dtype=dtype, seed=seed, backward=backward, causal=causal, window=window)
    if mask not in ("butterfly", "random"):
        raise ValueError(f'mask must be "window", "butterfly" or "random", got {mask!r}')
    if N % block:
        raise ValueError(f"block = {block} must divide N = {N}")
    n = N // block
    if mask == "butterfly":
        tiles = butterfly_block_mask(n, num_global=1)
    else:
        tiles = random_block_mask(np.random.default_rng(seed).random((n, n)), density)
        tiles[np.arange(n), np.arange(n)] = True  # every query sees a key
    a = Attention((B, N, H, D), dtype, backward, bool(causal), tiles=tiles, block=block, seed=seed)
    return _problem(a, [f"{mask} tiles of {block}, {tiles.mean():.0%} visible"])


def _problem(a, words):
    kv = [f"{a.kv_heads} key heads"] if a.kv_heads else []
    words = [
        f"{list(a.shape)} {a.dtype}", *kv, "causal" if a.causal else "full", *words,
        "forward + backward" if a.backward else "forward",
    ]  # fmt: skip
    entries = {**ours(a), **peers(a)}
    return Problem(", ".join(words), a.flops, a.nbytes, a.dtype, entries, lambda: a.exact)


@dataclass(frozen=True)
class Decode:
    """One query a head against a cache: q [B, H, D], k, v [B, S, Hkv, D], lengths [B]; inputs drawn with
    `seed`.
    """

    shape: tuple[int, int, int, int]
    dtype: str
    kv_heads: int
    lengths: tuple[int, ...]
    seed: int

    @cached_property
    def arrays(self):
        """{q, k, v} on JAX's device."""
        B, S, H, D = self.shape
        kv = (B, S, self.kv_heads, D)
        return dict(zip("qkv", drawn(self.seed, self.dtype, (B, H, D), kv, kv), strict=True))

    @property
    def ragged(self):
        """Whether any request is shorter than the cache."""
        return any(n != self.shape[1] for n in self.lengths)

    @cached_property
    def heads(self):
        """Random (batch, key head) pairs."""
        B, S, _, D = self.shape
        count = max(1, min(B * self.kv_heads, 8 * MOST_KEYS // (S * D)))
        order = np.random.default_rng(self.seed + 1).permutation(B * self.kv_heads)[:count]
        return [divmod(int(i), self.kv_heads) for i in order]

    @cached_property
    def exact(self):
        """[o [G, D] in float64] of the checked heads."""
        from ref.attention.lean import lean_attention

        b, h = np.transpose(self.heads)
        q = self._checked(np.asarray(self.arrays["q"]))
        k, v = (np.asarray(self.arrays[n][b, :, h]) for n in ("k", "v"))

        def head(i):
            n = self.lengths[b[i]]
            one = wide(q[i])[None], wide(k[i, :n])[None, None], wide(v[i, :n])[None, None]
            return lean_attention(*one, block_n=4096)[0]

        return [head(i) for i in range(len(self.heads))]

    def _checked(self, o):
        """The checked heads of o [B, H, D]: [checked, G, D]."""
        B, _, H, D = self.shape
        b, h = np.transpose(self.heads)
        return o.reshape(B, self.kv_heads, H // self.kv_heads, D)[b, h]

    def error(self, out, convert=np.asarray):
        """Relative error of o, [B, H, D] or with an axis of one query, of the worst head that is checked."""
        return np.max([apart([o], [x]) for o, x in zip(self._checked(convert(out)), self.exact, strict=True)])


def torch_decoding(k, v, lengths=None, *, backend, masked=False):
    """attend(q, steps=1) by PyTorch's scaled_dot_product_attention: q [B, H, 1, D], k, v [B, Hkv, S, D].

    lengths: numbers of keys, in calls of one request each or, masked, in one call that reads all keys. steps:
    each takes the result of the one before for its query.
    """
    torch, chosen = torch_device()[0], sdpa_by(backend)
    attend = torch.nn.functional.scaled_dot_product_attention
    parts, mask = [(slice(None), k, v)], None
    if masked:
        keys = torch.arange(k.shape[2], device=k.device)[None]
        mask = (keys < torch.tensor(lengths, device=k.device)[:, None])[:, None, None]
    elif lengths is not None:
        parts = [(slice(i, i + 1), k[i : i + 1, :, :n], v[i : i + 1, :, :n]) for i, n in enumerate(lengths)]

    def step(q):
        gqa = q.shape[1] != k.shape[1]
        out = [attend(q[at], *theirs, attn_mask=mask, enable_gqa=gqa) for at, *theirs in parts]
        return out[0] if len(out) == 1 else torch.cat(out)

    def run(q, steps=1):
        with torch.no_grad(), chosen():
            for _ in range(steps):
                q = step(q)
        return q

    return run


def lean(shape, *, dtype, seed, backward=False, kv_heads=0, lengths="full", block=0, workers=0):
    """Shape B x S x H x D: one query a head over S keys. lengths: "full", "ragged" (log-uniform up to S, from
    S / 128), or numbers; block, workers: of the schedule, 0 is the default.
    """
    import jax
    import jax.numpy as jnp

    import accel

    B, S, H, D = _four("lean", shape)
    kv_heads = int(kv_heads) or H
    _check_heads(H, kv_heads)
    if backward:
        raise ValueError("lean decodes: it is raced without --backward")
    if lengths == "full":
        lengths = (S,) * B
    elif lengths == "ragged":
        low, high = np.log([max(1, S // 128), S])
        lengths = np.exp(np.random.default_rng(seed + 3).uniform(low, high, B)).astype(int).tolist()
    lengths = tuple(int(n) for n in (lengths if isinstance(lengths, tuple | list) else (lengths,)))
    if len(lengths) != B or not all(1 <= n <= S for n in lengths):
        raise ValueError(f"lengths must be {B} numbers from 1 to {S}, got {lengths}")
    d = Decode((B, S, H, D), dtype, kv_heads, lengths, seed)
    on = lambda n: d.arrays[n]
    heads_first = cache(lambda n: jax.jit(lambda x: jnp.moveaxis(x, 1, 2))(on(n)))
    options = {"error": d.error, "bound": tolerance(dtype)}
    known, there = np.array(lengths, np.int32), jnp.asarray(lengths, jnp.int32)

    def mine(name, impl):
        f = getattr(accel.lean, name)
        plan = {k: int(n) for k, n in (("block_n", block), ("num_workers", workers)) if n}
        call = lambda q, k, v: f(q, k, v, lengths=known, impl=impl, **plan)
        return entry(call, on("q"), heads_first("k"), heads_first("v"), **options)

    def jax_nn(implementation):
        more = {"key_value_seq_lengths": there} if d.ragged else {}
        call = lambda q, k, v: jax.nn.dot_product_attention(
            q[:, None], k, v, implementation=implementation, **more
        )
        return entry(call, on("q"), on("k"), on("v"), **options)

    def pallas():
        _on("gpu")
        m = package("jax.experimental.pallas.ops.gpu.decode_attention", "this kernel of JAX's")
        if kv_heads == H and H > 1:
            raise NotImplementedError("its grouped form needs fewer key heads than queries")
        call = lambda q, k, v: m.gqa(q, k, v, kv_seq_len=there if d.ragged else None, sm_scale=D**-0.5)
        return entry(call, on("q"), on("k"), on("v"), **options)

    def torch_sdpa(backend, masked=False):
        q, k, v = to_torch(on("q"))[:, :, None], to_torch(heads_first("k")), to_torch(heads_first("v"))
        attend = torch_decoding(k, v, lengths if d.ragged else None, backend=backend, masked=masked)
        return Call(lambda: attend(q), partial(d.error, convert=from_torch), tolerance(dtype))

    def flash_attn(name):
        m = package(FLASH_ATTN[name], name)
        needs_gpu()
        torch, _ = torch_device()
        q, k, v = to_torch(on("q"))[:, None], to_torch(on("k")), to_torch(on("v"))
        lens = to_torch(known)
        cached = getattr(m, "flash_attn_with_kvcache", None)
        if cached is None and d.ragged:
            raise NotImplementedError("it has no cache with lengths here")
        first = lambda o: o[0] if isinstance(o, tuple) else o

        def run():
            with torch.no_grad():
                if cached is None:
                    return first(m.flash_attn_func(q, k, v))
                return first(cached(q, k, v, cache_seqlens=lens))

        return Call(run, partial(d.error, convert=from_torch), tolerance(dtype))

    entries = {f"accel ({impl})": partial(mine, "lean_attention", impl) for impl in IMPLS}
    entries["accel fixed split (auto)"] = partial(mine, "flash_decoding_attention", "auto")
    entries |= {f"jax.nn {n}": partial(jax_nn, n) for n in ("cudnn", "xla")}
    entries["jax pallas decode"] = pallas
    for n in ("cudnn", "flash", "default"):
        how = ", a call a request" if d.ragged else ""
        entries[f"torch sdpa {n}{how}"] = partial(torch_sdpa, n)
    if d.ragged:
        entries["torch sdpa cudnn, a mask"] = partial(torch_sdpa, "cudnn", masked=True)
    entries |= {n: partial(flash_attn, n) for n in FLASH_ATTN}
    keys = sum(lengths)
    size = on("q").dtype.itemsize
    words = f"[{B}, {S}, {H}, {D}] {dtype}, {kv_heads} key heads, one query"
    words += f", {keys:,} keys in {B} requests" if d.ragged else ""
    nbytes = (2 * keys * kv_heads + 2 * B * H) * D * size
    return Problem(words, 4.0 * H * D * keys, nbytes, dtype, entries, lambda: d.exact)


def _four(slug, shape):
    if len(shape) != 4 or min(shape) < 1:
        raise ValueError(f"--shape of {slug} must be BxNxHxD, got {'x'.join(map(str, shape))}")
    return tuple(shape)


def _check_heads(heads, kv_heads):
    if kv_heads < 0 or (kv_heads and heads % kv_heads):
        raise ValueError(f"kv_heads must divide the {heads} heads, got {kv_heads}")


def options_of(problem):
    """{name: default} of what `--set` may change."""
    fixed = ("shape", "dtype", "seed", "backward")
    return {n: p.default for n, p in inspect.signature(problem).parameters.items() if n not in fixed}
