"""From any JAX function to an op program: the one module of hw's core that imports JAX.

The function is traced once with abstract values. Calls (jit, custom derivatives, remat) are inlined, their
names kept as scopes; loops, branches, kernels and sharded regions keep their bodies; values that reach no
output are removed.
"""

import dataclasses
import inspect
from functools import partial, reduce
from math import prod

import jax
import numpy as np
from jax.extend import core as jex

from hw import primitives
from hw.errors import DynamicShape, NotTraceable, SideEffect, UnsupportedPrimitive
from hw.interpret import call_block, evaluate
from hw.passes import finish, prune, resolve, used_inputs
from hw.program import (
    Block,
    Branch,
    Kernel,
    KernelOperand,
    Loop,
    Op,
    Program,
    Shard,
    Tensor,
    itemsize,
)
from hw.traffic import WALK_LIMIT, closed_form, moved_blocks, projection

# Call-like primitives of jax 0.10 to 0.12 and the parameter that holds what they call.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_jvp_call_jaxpr": "fun_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "custom_lin": "call_jaxpr",
    "remat2": "jaxpr",
    "remat": "jaxpr",
    "checkpoint": "jaxpr",
    "composite": "jaxpr",
    "run_state": "jaxpr",
}
# Primitives that stand for others: written out here, so that nothing behind the tracer needs to know them.
_COMPOSITES = {
    "one_minus_square": lambda x: (1 + x) * (1 - x),
    "polynomial": lambda x, *c, unroll=None: reduce(
        lambda total, a: jax.lax.add(jax.lax.mul(total, x), a), c[-2::-1], c[-1]
    ),
}
_EFFECTS = ("pure_callback", "io_callback", "debug_callback", "debug_print", "infeed", "outfeed")
_FOLDS = ("transpose", "reshape", "squeeze", "expand_dims")  # of weights: done once, before the program runs


def trace(fn, *args, weights=(), static=None, trip_counts=None) -> Program:
    """The op program of fn(*args, **static).

    Args: fn: any function that JAX can trace. args: arrays, (dtype, shape) specs, or trees of them; values
      are
        not used. weights: names (or positions) of arguments that are parameters, there before the program
        runs.
      static: keyword options, taken as they are. trip_counts: {name: trips} for while loops whose count
        is not known from constants; the names are those that `UnknownTripCount` reports.
    Raises: UnsupportedPrimitive, NotTraceable for a function that needs values (not a JAX function),
      SideEffect, DynamicShape, ValueError for a name in weights or trip_counts that does not exist.
    """
    return trace_equations(fn, *args, weights=weights, static=static, trip_counts=trip_counts)[0]


def trace_equations(fn, *args, weights=(), static=None, trip_counts=None):
    """(program, {op id: JAX's equation it was made from}): `trace`, for comparing op by op with JAX."""
    names = _argument_names(fn, len(args))
    unknown = [w for w in weights if w not in names and not (isinstance(w, int) and 0 <= w < len(args))]
    if unknown:
        raise ValueError(f"weights names {unknown[0]!r}, but the arguments are {', '.join(names) or 'none'}")
    args = tuple(jax.tree.map(_abstract, a, is_leaf=_is_spec) for a in args)
    call = (lambda *a: fn(*a, **static)) if static else fn
    closed, shape = _make_jaxpr(call, args)
    title = getattr(fn, "__name__", type(fn).__name__)

    t = _Tracer(dict(trip_counts or {}))
    paths = jax.tree_util.tree_flatten_with_path(args)[0]
    inputs, labels = [], []
    for (path, _), var in zip(paths, closed.jaxpr.invars, strict=True):
        position = path[0].idx
        label = names[position] + jax.tree_util.keystr(path[1:])
        role = "weight" if names[position] in weights or position in weights else "input"
        inputs.append(t.tensor(var.aval, role, label))
        labels.append(label)
    block = t.block(closed.jaxpr, closed.consts, "", inputs=tuple(inputs))
    block = prune(block)
    block = resolve(t.tensors, block, {}, 1, trip_counts=t.trip_counts)
    left = set(t.trip_counts) - t.while_names
    if left:
        known = ", ".join(sorted(t.while_names)) or "none"
        raise ValueError(f"trip_counts names {sorted(left)[0]!r}, but the while loops are {known}")
    outs = jax.tree_util.tree_flatten_with_path(shape)[0]
    out_names = tuple("result" + jax.tree_util.keystr(p) for p, _ in outs)
    program = Program(title, finish(t.tensors, block), block, tuple(labels), out_names, tuple(names))
    return program, t.equations


def _make_jaxpr(call, args):
    try:
        closed, shape = jax.make_jaxpr(call, return_shape=True)(*args)
    except (UnsupportedPrimitive, SideEffect):
        raise
    except jax.errors.NonConcreteBooleanIndexError as e:
        raise DynamicShape(f"the shape of a value depends on data: {_first_line(e)}") from e
    except (
        jax.errors.ConcretizationTypeError,
        jax.errors.TracerArrayConversionError,
        jax.errors.TracerIntegerConversionError,
    ) as e:
        if any(words in str(e) for words in ("size argument", "hapes must be", "total_repeat_length")):
            raise DynamicShape(f"the shape of a value depends on data: {_first_line(e)}") from e
        raise NotTraceable(
            f"the function needs the value of an array, so it is not a JAX function of it: {_first_line(e)}; "
            "options belong in static={...}"
        ) from e
    except TypeError as e:
        if "shape" in str(e).lower() and "concrete" in str(e).lower():
            raise DynamicShape(f"the shape of a value depends on data: {_first_line(e)}") from e
        if "valid JAX type" in str(e) or "JAX array" in str(e):
            raise NotTraceable(f"not a function from arrays to arrays: {_first_line(e)}") from e
        raise
    return closed, shape


def _first_line(e):
    return str(e).strip().split("\n")[0]


def _argument_names(fn, n):
    try:
        kinds = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return [f"arg{i}" for i in range(n)]
    names = [p.name for p in kinds if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:n]
    return names + [f"arg{i}" for i in range(len(names), n)]


def _is_spec(x):
    return (
        isinstance(x, tuple | list)
        and len(x) == 2
        and isinstance(x[0], str | np.dtype | type)
        and isinstance(x[1], tuple | list)
    )


def _abstract(x):
    if _is_spec(x):
        dtype, shape = x
        return jax.ShapeDtypeStruct(tuple(shape), jax.dtypes.canonicalize_dtype(_dtype(dtype)))
    return x


def _dtype(x):
    return jax.numpy.dtype(x)


class _Tracer:
    """Turns jaxprs into blocks; ids are unique in the program."""

    def __init__(self, trip_counts):
        self.tensors, self.trip_counts = {}, trip_counts
        self.next_op, self.equations = 0, {}
        self.literals, self.while_names, self.scopes = {}, set(), {}
        self.mesh = {}
        self.kernel = None
        self.at = ""  # line of the call that is being inlined, for ops inside JAX's own functions

    # Tensors

    def tensor(self, aval, role="activation", name=""):
        i = len(self.tensors)
        aval = getattr(aval, "inner_aval", aval)  # a reference: what it refers to
        shape = getattr(aval, "shape", ())
        if not all(isinstance(n, int | np.integer) for n in shape):
            raise DynamicShape(f"a value has the shape {shape}, which is not known before it runs")
        self.tensors[i] = Tensor(i, tuple(int(n) for n in shape), _dtype_name(aval), role, name)
        return i

    def constant(self, value):
        aval = jax.typeof(value) if not isinstance(value, np.ndarray | np.generic) else value
        dtype = str(aval.dtype)
        if dtype.startswith("key<"):
            value = jax.random.key_data(value)
            if dtype != "key<fry>":
                raise UnsupportedPrimitive(
                    "random key", np.shape(value), why=f"only threefry keys, got {dtype}"
                )
            words = np.asarray(value).astype(np.uint64)
            array = (words[..., 0] << np.uint64(32)) | words[..., 1]
        else:
            array = np.asarray(value, dtype=aval.dtype)
        data = np.ascontiguousarray(array).tobytes()
        key = (dtype, array.shape, data)
        if key not in self.literals:
            i = len(self.tensors)
            self.tensors[i] = Tensor(i, array.shape, dtype, "const", data=data)
            self.literals[key] = i
        return self.literals[key]

    # Blocks

    def block(self, jaxpr, consts, scope, *, inputs=None, recompute=False):
        """A closed block of a jaxpr; its inputs are fresh tensors unless given."""
        if inputs is None:
            inputs = tuple(self.tensor(v.aval) for v in jaxpr.invars)
        ops = []
        env = dict(zip(jaxpr.invars, inputs, strict=True))
        env.update({v: self.constant(c) for v, c in zip(jaxpr.constvars, consts, strict=True)})
        outputs = self.run(jaxpr, env, scope, ops, recompute)
        return Block(tuple(inputs), tuple(ops), tuple(outputs))

    def run(self, jaxpr, env, scope, ops, recompute):
        """Append the ops of a jaxpr; returns the ids of its outputs."""

        def read(v):
            return self.constant(_literal(v)) if isinstance(v, jex.Literal) else env[v]

        for eqn in jaxpr.eqns:
            args = [read(v) for v in eqn.invars]
            outs = self.eqn(eqn, args, scope, ops, recompute)
            for v, i in zip(eqn.outvars, outs, strict=True):
                env[v] = i
        return [read(v) for v in jaxpr.outvars]

    def eqn(self, eqn, args, scope, ops, recompute):
        name, params = eqn.primitive.name, eqn.params
        here = _join(scope, str(eqn.source_info.name_stack))
        if name in _EFFECTS or name.endswith("callback"):
            raise SideEffect(name, here, self.source(eqn))
        if name in _CALLS:
            inner = params.get(_CALLS[name])
            if inner is None:  # the name of the parameter has changed before
                inner = next(v for k, v in params.items() if "jaxpr" in k and hasattr(v, "eqns"))
            jaxpr, consts = (inner.jaxpr, inner.consts) if hasattr(inner, "jaxpr") else (inner, ())
            again = recompute or bool(params.get("differentiated", False))
            called = params.get("name") or ""
            below = _join(here, called if isinstance(called, str) else "")
            env = dict(zip(jaxpr.invars, args, strict=True))
            env.update({v: self.constant(c) for v, c in zip(jaxpr.constvars, consts, strict=True)})
            before, self.at = self.at, self.source(eqn)
            outs = self.run(jaxpr, env, below, ops, again)
            self.at = before
            return outs
        if name in _COMPOSITES:
            meant = partial(_COMPOSITES[name], **params)
            inner = jax.make_jaxpr(meant)(*(v.aval for v in eqn.invars))
            env = dict(zip(inner.jaxpr.invars, args, strict=True))
            return self.run(inner.jaxpr, env, here, ops, recompute)
        structured = {
            "scan": self.scan,
            "while": self.while_loop,
            "cond": self.cond,
            "pallas_call": self.pallas,
            "shard_map": self.shard_map,
            "run_scoped": self.run_scoped,
        }.get(name)
        if structured:
            return structured(eqn, args, here, ops, recompute)
        return self.leaf(eqn, args, here, ops, recompute)

    def append(self, ops, kind, prim, args, avals, dims, scope, attrs=None, recompute=False, source=""):
        outs = tuple(self.tensor(a) for a in avals)
        ops.append(
            Op(self.next_op, kind, prim, tuple(args), outs, dims, scope, 1, recompute, attrs or {}, source)
        )
        self.next_op += 1
        return outs

    def leaf(self, eqn, args, scope, ops, recompute):
        name = eqn.primitive.name
        avals = [v.aval for v in eqn.outvars]
        shape = tuple(getattr(avals[0], "shape", ())) if avals else ()
        refuse = lambda why: UnsupportedPrimitive(name, shape, scope, self.source(eqn), why)
        try:
            attrs, args = self.attributes(eqn, args)
        except NotImplementedError as e:
            raise refuse(str(e)) from e
        dtypes = [self.tensors[i].dtype for i in args]
        if any("complex" in d for d in [*dtypes, *(str(getattr(a, "dtype", "")) for a in avals)]):
            raise refuse("complex numbers have no price here")
        ins = [(self.tensors[i].shape, self.tensors[i].dtype) for i in args]
        outs = [(tuple(a.shape), _dtype_name(a)) for a in avals]
        found = primitives.rule(name, ins, outs, attrs)
        if found is None:
            raise refuse("the op program has no rule for it")
        kind, dims = found
        made = self.append(ops, kind, name, args, avals, dims, scope, attrs, recompute, self.source(eqn))
        self.equations[ops[-1].id] = eqn
        if name in _FOLDS and self.kernel is None and self.tensors[args[0]].role in ("weight", "const"):
            if self.tensors[args[0]].size > 1:
                ops[-1] = dataclasses.replace(ops[-1], attrs=attrs | {"folded": True})
                self.tensors[made[0]] = dataclasses.replace(self.tensors[made[0]], role="weight")
        return made

    # Structured ops

    def scan(self, eqn, args, scope, ops, recompute):
        p = eqn.params
        inner = p["jaxpr"]
        body = self.block(inner.jaxpr, inner.consts, scope, recompute=recompute)
        if "ft_in" in p:  # JAX 0.12 on keeps the trees of (constants, carries, slices)
            consts, carries = (len(tree) for tree in p["ft_in"].unpack()[:2])
        else:
            consts, carries = p["num_consts"], p["num_carry"]
        dims = Loop(
            body=body,
            trips=int(p["length"]),
            consts=consts,
            carries=carries,
            xs=len(args) - consts - carries,
            reverse=bool(p["reverse"]),
            name=self.unique(scope, "scan"),
        )
        return self.append(
            ops,
            "loop",
            "scan",
            args,
            [v.aval for v in eqn.outvars],
            dims,
            scope,
            {},
            recompute,
            self.source(eqn),
        )

    def while_loop(self, eqn, args, scope, ops, recompute):
        p = eqn.params
        cond, body = p["cond_jaxpr"], p["body_jaxpr"]
        name = self.unique(scope, "while")
        self.while_names.add(name)
        dims = Loop(
            body=self.block(body.jaxpr, body.consts, scope, recompute=recompute),
            trips=None,
            consts=p["body_nconsts"],
            carries=len(args) - p["cond_nconsts"] - p["body_nconsts"],
            cond=self.block(cond.jaxpr, cond.consts, scope, recompute=recompute),
            cond_consts=p["cond_nconsts"],
            name=name,
        )
        avals = [v.aval for v in eqn.outvars]
        return self.append(ops, "loop", "while", args, avals, dims, scope, {}, recompute, self.source(eqn))

    def cond(self, eqn, args, scope, ops, recompute):
        branches = tuple(
            self.block(b.jaxpr, b.consts, scope, recompute=recompute) for b in eqn.params["branches"]
        )
        avals = [v.aval for v in eqn.outvars]
        return self.append(
            ops, "branch", "cond", args, avals, Branch(branches), scope, {}, recompute, self.source(eqn)
        )

    def run_scoped(self, eqn, args, scope, ops, recompute):
        """Scratch of a kernel body: the references are extra inputs of the inner jaxpr, inlined."""
        inner = eqn.params["jaxpr"]
        inner = inner.jaxpr if hasattr(inner, "consts") else inner
        fresh = [self.tensor(v.aval) for v in inner.invars]
        for i in fresh:
            self.kernel["scratch"].append((i, self.tensors[i].shape, self.tensors[i].dtype))
        env = dict(zip(inner.invars, fresh, strict=True))
        env.update(zip(inner.constvars, args, strict=True))
        return self.run(inner, env, scope, ops, recompute)

    def shard_map(self, eqn, args, scope, ops, recompute):
        p = eqn.params
        inner = p["jaxpr"]
        jaxpr, consts = (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, ())
        before = self.mesh
        sizes = {str(k): int(v) for k, v in dict(p["mesh"].shape).items()}
        self.mesh = before | sizes
        body = self.block(jaxpr, consts, scope, recompute=recompute)
        self.mesh = before
        spec = lambda s, aval: tuple(
            _axes(s[d]) if d < len(s) else () for d in range(len(getattr(aval, "shape", ())))
        )
        dims = Shard(
            body,
            tuple(sizes.items()),
            tuple(spec(s, v.aval) for s, v in zip(p["in_specs"], eqn.invars, strict=True)),
            tuple(spec(s, v.aval) for s, v in zip(p["out_specs"], eqn.outvars, strict=True)),
        )
        avals = [v.aval for v in eqn.outvars]
        return self.append(
            ops, "shard", "shard_map", args, avals, dims, scope, {}, recompute, self.source(eqn)
        )

    def pallas(self, eqn, args, scope, ops, recompute):
        p = eqn.params
        gm, jaxpr = p["grid_mapping"], p["jaxpr"]
        jaxpr, consts = (jaxpr.jaxpr, jaxpr.consts) if hasattr(jaxpr, "consts") else (jaxpr, ())
        where = dict(shape=eqn.outvars[0].aval.shape, scope=scope, source=self.source(eqn))
        if gm.num_dynamic_grid_bounds or not all(isinstance(n, int) for n in gm.grid):
            raise UnsupportedPrimitive("pallas_call", why="a grid that depends on data", **where)
        grid = tuple(int(n) for n in gm.grid)
        prefetch = gm.num_index_operands
        aliases = tuple((int(a), int(b)) for a, b in p.get("input_output_aliases") or ())
        aliased = {gm.num_inputs + b for _, b in aliases}
        before, self.kernel = self.kernel, {"scratch": []}
        operands = [
            KernelOperand(self.tensors[a].shape, self.tensors[a].dtype, (), (), None, False, "prefetch")
            for a in args[:prefetch]
        ]
        scalars = [self.value(a, ops) for a in args[:prefetch]]
        for n, bm in enumerate(gm.block_mappings):
            operands.append(
                self.operand(bm, grid, n >= gm.num_inputs, n in aliased, n, where, scope, scalars)
            )
        body = self.block(jaxpr, consts, scope, recompute=recompute)
        loose = len(jaxpr.invars) - len(operands)
        scratch = [
            (self.tensors[i].shape, self.tensors[i].dtype) for i in body.inputs[len(body.inputs) - loose :]
        ]
        extra = self.kernel["scratch"]
        self.kernel = before
        memory = {i: o.memory for i, o in zip(body.inputs, operands, strict=False)}
        body = self.copies(body, memory)
        given = {i: x for i, x in zip(body.inputs, scalars, strict=False) if x is not None}
        body = resolve(
            self.tensors,
            body,
            {},
            np.ones((1,) * len(grid), np.int64),
            grid=grid,
            trip_counts=self.trip_counts,
            scalars=given,
        )
        body = Block((*body.inputs, *(i for i, _, _ in extra)), body.ops, body.outputs)
        claimed = p.get("cost_estimate")
        name = p.get("name") or getattr(p.get("name_and_src_info"), "name", None) or "kernel"
        dims = Kernel(
            name=str(name),
            grid=grid,
            operands=tuple(operands),
            body=body,
            prefetch=prefetch,
            aliases=aliases,
            scratch=(*scratch, *((s, d) for _, s, d in extra)),
            claimed={k: int(getattr(claimed, k)) for k in ("flops", "transcendentals", "bytes_accessed")}
            if claimed is not None
            else None,
        )
        avals = [v.aval for v in eqn.outvars]
        return self.append(
            ops,
            "kernel",
            "pallas_call",
            args,
            avals,
            dims,
            _join(scope, str(name)),
            {},
            recompute,
            self.source(eqn),
        )

    def value(self, i, ops, limit=1 << 20):
        """The value of a tensor that constants alone determine, or None."""
        t = self.tensors[i]
        if t.role == "const":
            return t.array
        made = next((op for op in ops if i in op.outputs), None)
        if made is None or made.blocks or t.size > limit or made.kind in ("random", "collective"):
            return None
        args = [self.value(j, ops, limit) for j in made.inputs]
        if any(a is None for a in args):
            return None
        return evaluate(made, args, self.tensors)[made.outputs.index(i)]

    def operand(self, bm, grid, output, aliased, number, where, scope, scalars):
        aval = bm.array_aval
        array, dtype = tuple(int(n) for n in aval.shape), _dtype_name(aval)
        space = str(getattr(bm.transformed_block_aval, "memory_space", "")).lower()
        if space in ("any", "hbm", "gmem", "memoryspace.any"):
            return KernelOperand(array, dtype, array, (), None, output, "any")
        block, squeezed, element = [], [], []
        for d, b in enumerate(bm.block_shape):
            kind = type(b).__name__
            if b is None or kind in ("Squeezed", "Mapped"):
                squeezed.append(d)
                block.append(1)
            elif isinstance(b, int):
                block.append(b)
            elif kind in ("Blocked", "Element"):
                if kind == "Element" and tuple(b.padding) != (0, 0):
                    raise UnsupportedPrimitive("pallas_call", why="padded element blocks", **where)
                if kind == "Element":
                    element.append(d)
                block.append(int(b.block_size))
            else:
                raise UnsupportedPrimitive("pallas_call", why=f"blocks of kind {kind}", **where)
        ij = bm.index_map_jaxpr
        index_map = self.block(ij.jaxpr, ij.consts, scope)
        fetches = moved = None
        index_map = prune(index_map)
        unknown = {i for i, x in zip(index_map.inputs[len(grid) :], scalars, strict=True) if x is None}
        if unknown.isdisjoint(used_inputs(index_map)):
            fetches, moved = self.traffic(
                index_map, grid, tuple(block), array, output, aliased, number, element, scalars
            )
            moved = int(-(-moved * itemsize(dtype) // 1))
        return KernelOperand(
            array,
            dtype,
            tuple(block),
            tuple(squeezed),
            index_map,
            output,
            "block",
            tuple(element),
            fetches,
            moved,
        )

    def traffic(self, index_map, grid, block, array, output, aliased, number, element, scalars):
        """(blocks, elements) an operand moves over the grid: by walking, or in closed form on a huge grid."""

        def at(*steps):
            n = len(steps[0]) if steps else 1
            args = [*(np.asarray(s, np.int32) for s in steps), *(0 if x is None else x for x in scalars)]
            found = call_block(self.tensors, index_map, args)
            return np.stack([np.broadcast_to(np.asarray(i, np.int64), n) for i in found], axis=1)

        if prod(grid) > WALK_LIMIT and not element:
            one = lambda *s: tuple(at(*(np.array([i]) for i in s))[0])
            proj = projection(grid, one, len(block))
            if proj is not None:
                return closed_form(grid, proj, block, array, output and not aliased)
        if prod(grid) > 64 * WALK_LIMIT:
            raise UnsupportedPrimitive(
                "pallas_call", grid, why="a huge grid whose index map is no projection"
            )
        steps = np.indices(grid).reshape(len(grid), -1)
        where = at(*steps) if len(grid) else at()
        if not len(block):
            where = np.zeros((prod(grid), 0), np.int64)
        return moved_blocks(where, block, array, output, aliased, number, tuple(element))

    def copies(self, body, memory):
        """Bytes of main memory on the copies that a body makes itself, from and to operands left there."""

        def visit(block, memory):
            ops = []
            for op in block.ops:
                if op.prim == "dma_start":
                    size = self.copy_bytes(op)
                    src, dst = (op.inputs[op.attrs[k]] for k in ("source", "target"))
                    attrs = dict(op.attrs)
                    if memory.get(src) == "any":
                        attrs["hbm_read"] = size
                    if memory.get(dst) == "any":
                        attrs["hbm_write"] = size
                    op = dataclasses.replace(op, attrs=attrs)
                elif op.prim in ("get", "swap", "addupdate", "masked_load", "masked_swap"):
                    if memory.get(op.inputs[0]) == "any":  # a GPU kernel reads its operands in place
                        out = op.outputs or op.inputs[1:2]
                        size = self.tensors[out[0]].nbytes
                        reads = (
                            {"hbm_read": size} if op.prim in ("get", "masked_load") else {"hbm_write": size}
                        )
                        op = dataclasses.replace(op, attrs=op.attrs | reads)
                elif isinstance(op.dims, Branch):
                    inner = [
                        visit(b, dict(memory) | _passed(memory, b.inputs, op.inputs[1:])) for b in op.blocks
                    ]
                    op = dataclasses.replace(op, dims=Branch(tuple(inner)))
                elif isinstance(op.dims, Loop):
                    d = op.dims
                    outer = op.inputs[d.cond_consts :]
                    inner = visit(d.body, dict(memory) | _passed(memory, d.body.inputs, outer))
                    op = dataclasses.replace(op, dims=dataclasses.replace(d, body=inner))
                ops.append(op)
            return dataclasses.replace(block, ops=tuple(ops))

        return visit(body, memory)

    def copy_bytes(self, op):
        """Bytes of one dma_start: of its source after indexing."""
        t = self.tensors[op.inputs[op.attrs["source"]]]
        shape = list(t.shape)
        for d, part in enumerate(op.attrs["source_index"] or ()):
            shape[d] = part[2] if part[0] == "slice" else 1
        return int(prod(shape) * itemsize(t.dtype))

    # Parameters

    def attributes(self, eqn, args):
        """(parameters as plain values, operands): what running the op needs, in the program's own words."""
        name, p = eqn.primitive.name, eqn.params
        if name in ("get", "swap", "addupdate", "masked_load", "masked_swap", "dma_start", "dma_wait"):
            return self.reference(eqn, args)
        if name in ("semaphore_signal", "semaphore_wait", "semaphore_read"):
            return {}, args[:1]
        attrs = {}
        for k, v in p.items():
            plain = _plain(v)
            if plain is not _NOTHING:
                attrs[k] = plain
        if name in ("gather", *primitives.SCATTER):
            d = p["dimension_numbers"]
            attrs |= {k: _plain(getattr(d, k)) for k in _fields(d)}
            attrs["mode"] = getattr(p["mode"], "name", str(p["mode"])).upper()
            if attrs.get("fill_value") != attrs.get("fill_value"):
                attrs["fill_value"] = None  # NaN, the default of floats
        elif name == "conv_general_dilated":
            d = p["dimension_numbers"]
            attrs |= {k: tuple(getattr(d, k)) for k in ("lhs_spec", "rhs_spec", "out_spec")}
        elif name == "ragged_dot_general":
            d = p["ragged_dot_dimension_numbers"]
            attrs["dimension_numbers"] = _plain(d.dot_dimension_numbers)
            attrs["lhs_ragged_dimensions"] = _plain(tuple(d.lhs_ragged_dimensions))
            attrs["rhs_group_dimensions"] = _plain(tuple(d.rhs_group_dimensions))
        elif name == "reduce_window":
            eqns = (p.get("jaxpr") or p.get("computation")).eqns
            if len(eqns) != 1 or eqns[0].primitive.name not in ("add", "mul", "max", "min", "and", "or"):
                raise NotImplementedError("a window reduction by a function of its own")
            attrs["combine"] = eqns[0].primitive.name
        elif name == "select_and_scatter_add":
            attrs["select"] = p["select_prim"].name
        elif name in ("random_seed", "random_wrap"):
            if getattr(p["impl"], "name", "threefry2x32") != "threefry2x32":
                raise NotImplementedError(f"random keys of kind {p['impl'].name}")
        elif name == "rng_bit_generator":
            raise NotImplementedError("the bits of rng_bit_generator depend on the backend")
        elif name == "sort" and p.get("num_keys", 1) < 1:
            raise NotImplementedError("a sort without keys")
        if name in primitives.COLLECTIVE or name == "axis_index":
            axes = p.get("axes", p.get("axis_name"))
            axes = tuple(str(a) for a in (axes if isinstance(axes, tuple | list) else (axes,)))
            missing = [a for a in axes if a not in self.mesh]
            if missing or p.get("axis_index_groups") is not None:
                raise NotImplementedError(f"a collective over {axes} outside of a mesh, or in index groups")
            attrs["axes"] = axes
            attrs["devices"] = prod(self.mesh[a] for a in axes)
        return attrs, args

    def reference(self, eqn, args):
        """How a kernel body indexes a reference: ("slice", start, size, stride) or ("at", index) per axis.

        A start or index is a number, or ("in", n): the n-th operand.
        """
        name, p = eqn.primitive.name, eqn.params
        places = [_Place(n) for n in range(len(args))]
        if name.startswith("masked"):
            flat = jax.tree_util.tree_unflatten(p["args_tree"], places)
            if name == "masked_load":
                _, transforms, mask, other = flat
                value = None
            else:
                _, transforms, value, mask = flat
                other = None
            named = {"value": value, "mask": mask, "other": other}
            attrs = {k: v.n for k, v in named.items() if v is not None}
            attrs["index"] = self.indexer(transforms)
            return attrs, args
        if name.startswith("dma"):
            if p.get("add"):
                raise NotImplementedError("a copy that adds")
            (source, at), (target, to) = _ends(jax.tree_util.tree_unflatten(p["tree"], places))
            ends = {"source": source.n, "target": target.n}
            return ends | {"source_index": self.indexer(at), "target_index": self.indexer(to)}, args
        first = 1 if name == "get" else 2
        transforms = jax.tree_util.tree_unflatten(p["tree"], places[first:])
        return {"index": self.indexer(transforms)}, args

    def indexer(self, transforms):
        transforms = [t for t in transforms or () if type(t).__name__ != "RefAbstract"]
        if not transforms:
            return None
        if len(transforms) > 1 or type(transforms[0]).__name__ != "NDIndexer":
            raise NotImplementedError(f"references seen through {type(transforms[-1]).__name__}")
        parts = []
        number = lambda v: ("in", v.n) if isinstance(v, _Place) else int(v)
        for part in transforms[0].indices:
            if type(part).__name__ == "Slice":
                parts.append(("slice", number(part.start), int(part.size), int(part.stride)))
            else:
                parts.append(("at", number(part)))
        return tuple(parts)

    def source(self, eqn):
        return _source(eqn) or self.at

    def unique(self, scope, kind):
        """scope/kind, numbered from the second one on."""
        base = _join(scope, kind)
        n = self.scopes[base] = self.scopes.get(base, 0) + 1
        return base if n == 1 else f"{base}_{n}"


def _passed(memory, inner, outer):
    return {i: memory[o] for i, o in zip(inner, outer, strict=False) if o in memory}


class _Place:
    """Stands for the n-th operand while a tree of indices is put together."""

    def __init__(self, n):
        self.n = n


def _ends(flat):
    """(reference, transforms) of the source and of the target of a copy: one record each, or two entries."""
    if hasattr(flat[0], "transforms") or isinstance(flat[1], _Place) or hasattr(flat[1], "transforms"):
        return [(x.ref, x.transforms) if hasattr(x, "transforms") else (x, ()) for x in flat[:2]]
    return [(flat[0], flat[1]), (flat[2], flat[3])]


def _axes(entry):
    if entry is None:
        return ()
    return tuple(str(a) for a in (entry if isinstance(entry, tuple) else (entry,)))


def _fields(d):
    return d._fields if hasattr(d, "_fields") else [f for f in d.__dataclass_fields__]


_NOTHING = object()


def _plain(v):
    """A parameter as numbers, strings and tuples, or _NOTHING."""
    if v is None or isinstance(v, bool | str):
        return v
    if isinstance(v, int | np.integer):
        return int(v)
    if isinstance(v, float | np.floating):
        return float(v)
    if isinstance(v, np.dtype):
        return str(v)
    if isinstance(v, tuple | list) and not hasattr(v, "_fields"):
        parts = tuple(_plain(x) for x in v)
        return _NOTHING if any(x is _NOTHING for x in parts) else parts
    if isinstance(v, type) and issubclass(v, np.generic):
        return str(np.dtype(v))
    return _NOTHING


def _literal(v):
    value = v.val
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return value
    return np.asarray(value, dtype=v.aval.dtype)


def _dtype_name(aval):
    name = str(getattr(aval, "dtype", "int32"))
    return "int32" if "sem" in name else name  # a semaphore is a number


def _join(*parts):
    return "/".join(p for p in parts if p and p != "<lambda>")


def _source(eqn):
    """file:line of the caller's code, without JAX's own frames."""
    traceback = getattr(eqn.source_info, "traceback", None)
    for frame in getattr(traceback, "frames", ()):
        path = frame.file_name.replace("\\", "/")
        if "/jax/" not in path and "/hw/trace.py" not in path and not path.startswith("<frozen"):
            return f"{path.rsplit('/', 1)[-1]}:{frame.line_num}"
    return ""
