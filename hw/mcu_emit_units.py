"""The calls of C of one unit: what `hw.mcu_emit` writes for every step of a plan."""

from math import prod

import numpy as np

from hw.mcu_calibrate import SOFTMAX, SOFTMAX16, row
from hw.mcu_emit_moves import MOVES, Moves
from hw.mcu_flow import matrix_of_row
from hw.mcu_int8 import multiplier, rescaler
from hw.mcu_layout import NoLayout, broadcast_layout, conv_layout, product_layout, window_layout
from hw.program import is_float
from ref.blocks import int8_ops, int16_ops

_TWO = frozenset("add add_any sub mul div max min".split())
SAME_SCALE = (2**30, 1)  # a multiplier of 1


class Calls(Moves):
    """Calls of units: of the walk in `hw.mcu_emit`, which has the plan, the policy and the text."""

    def call(self, step, where, shapes, rows):
        """The kernels of one unit on operands at `where`, of these shapes."""
        unit, op, p = step.unit, step.unit.op, self.policy
        needed = {*self.units.reads(unit), *op.inputs, *(i for x in unit.chain for i in x.inputs)}
        p.env = {i: self.fixed(i) for i in needed if i in self.units.static and self._known(i)}
        if len(step.writes) != 1:
            self.refuse(op, "emit_c has no C for several results")
        out = step.writes[0]
        shapes = {i: self.tensors[i].shape for i in needed} | shapes
        named = {
            "lut": self._lut, "softmax": self._softmax, "layer_norm": self._norm,
            "conv_general_dilated": self._conv, "concatenate": self._join, "select_n": self._select,
            "pad": self._pad, "dynamic_slice": self._cut, "dynamic_update_slice": self._update,
        }  # fmt: skip
        kind = unit.kind if unit.kind in ("lut", "softmax", "layer_norm") else op.prim
        floats = [is_float(self.tensors[i].dtype) for i in (*step.reads, out)]
        try:
            if unit.kind == "lut":
                self._lut(unit, where, shapes, out)
            elif not any(floats):
                self._whole(op, where, shapes, out)
            elif not all(floats) and kind not in ("select_n", "dynamic_slice", "dynamic_update_slice"):
                other = next(i for i in (*step.reads, out) if not is_float(self.tensors[i].dtype))
                self.refuse(op, f"emit_c has int8 values here, not {self.tensors[other].dtype}")
            elif unit.kind == "product":
                self._product(unit, where, shapes, out, rows)
            elif kind in named:
                named[kind](unit, where, shapes, out)
            elif kind in _TWO:
                self._two(op, where, shapes, out, rows)
            elif kind in ("reduce_sum", "reduce_max", "reduce_min"):
                self._reduce(op, where, shapes, out)
            elif kind.startswith("reduce_window"):
                self._window(op, where, shapes, out)
            elif kind in MOVES:
                self._move(op, where, shapes, out)
            else:
                self.refuse(op, f"emit_c has no C for {kind!r}")
        except NoLayout as why:
            self.refuse(op, str(why))

    def _looped(self, loops, line):
        """Loops around a line that gets the steps of its operands as text: one for each column of `loops`."""
        names = [f"h{n}" for n in range(len(loops))]
        for name, (size, *_) in zip(names, loops, strict=True):
            self.text.append(f"for (int32_t {name} = 0; {name} < {size}; {name}++)")
        columns = zip(*(steps for _, *steps in loops), strict=True) if loops else ()
        text = ["".join(f" + {h} * {s}" for h, s in zip(names, c, strict=True) if s) for c in columns]
        line(*text) if loops else line(*[""] * 4)

    def _numbers(self, values):
        return self.constant(np.array(values), "int32_t")

    # Kernels of one operand

    def _lut(self, unit, where, shapes, out):
        p, n, x = self.policy, prod(shapes[out]), where[unit.source]
        table = p.table(unit)
        if table is None:
            self.refuse(unit.op, "emit_c has tables of 16 bits where straight lines come close enough")
        if not is_float(self.tensors[out].dtype) and table.dtype.itemsize != 1:
            table = self.constant(table, f"{table.dtype}_t")
            self.text.append(
                f"for (int32_t i = 0; i < {n}; i++) ({where[out]})[i] = {table}[({x})[i] + 128];"
            )
            return
        if not is_float(self.tensors[out].dtype):
            table, where = table.view(np.int8), {**where, out: f"(int8_t *)({where[out]})"}
        self.line("lut", x, self.constant(table, self.ctype), where[out], n)

    def _softmax(self, unit, where, shapes, out):
        p, n, last = self.policy, prod(shapes[out]), shapes[out][-1]
        scale = p.grid(unit.source)[0]
        if p.bits == 8:
            usual, rest = SOFTMAX, int8_ops.softmax_params_s8(input_scale=scale)
        else:
            tables = [self.constant(t, "int16_t") for t in int16_ops.softmax_tables_s16()]
            usual, rest = SOFTMAX16, (*int16_ops.softmax_params_s16(input_scale=scale), *tables)
        self.line("softmax", where[unit.source], where[out], n // last, last, *rest)
        if p.grid(out) != usual:
            self._rescale(where[out], where[out], n, *usual, *p.grid(out))

    def _norm(self, unit, where, shapes, out):
        p, last = self.policy, shapes[out][-1]
        scale, zero = p.grid(out)
        gamma, beta = row(p.env, unit.gamma, last, 1.0), row(p.env, unit.beta, last, 0.0)
        params = int8_ops.norm_params_s8 if p.bits == 8 else int16_ops.norm_params_s16
        g, b, m, shift = params(gamma, beta, scale)
        g, b = self.constant(g, "int16_t"), self.constant(b, "int32_t")
        rows, offset = prod(shapes[out]) // last, -p.grid(unit.source)[1]
        self.line("layernorm", where[unit.source], g, b, where[out], rows, last, offset, m, shift, zero,
                  int(unit.center))  # fmt: skip

    def _rescale(self, x, y, n, scale, zero, out_scale, out_zero):
        self.line("rescale", x, y, n, -zero, *rescaler(scale / out_scale, self.policy.bits), out_zero)

    # Products

    def _weights(self, op, codes, scale, x_scale, out, bias):
        """Names of weights [N, K], bias, multipliers and shifts in flash, checked for sums of 32 bits."""
        p, real = self.policy, x_scale * scale
        mul, shift = p.product_params(real / p.grid(out)[0])
        added, half = np.zeros(len(codes)), p.widest // 2
        if bias is not None:
            added = np.clip(np.rint(bias / real), -half, half)
        if not p.fits(np.abs(codes).sum(1) * float(p.span) + np.abs(added), mul, shift):
            self.refuse(op, "a multiplier above 1 could leave 32 bits")
        b = 0
        if bias is not None:
            b = self.constant(added.astype(np.int64), "int32_t" if p.bits == 8 else "int64_t")
        w = self.constant(codes.astype(np.int64), "int8_t")
        return w, b, self.constant(mul, "int32_t"), self.constant(shift, "int32_t")

    def _product(self, unit, where, shapes, out, rows=1):
        op, p = unit.op, self.policy
        static = [i in self.units.static for i in op.inputs[:2]]
        lay = product_layout(op, *(shapes[i] for i in op.inputs[:2]), *static, unit.perm)
        x, w = reversed(op.inputs[:2]) if lay.turned else op.inputs[:2]
        (sx, zx), (so, zo) = p.grid(x), p.grid(out)
        if any(static):
            self._matmul(unit, lay, x, w, where, out, rows, sx, zx, zo)
            return
        sw, zw = p.grid(w)
        mul, shift = p.product_params(np.float64(sx * sw / so))
        if not p.fits(np.float64(lay.k * p.span**2), mul, shift):
            self.refuse(op, "a multiplier above 1 could leave 32 bits")
        steps = [] if lay.kernel == "product" else [self._numbers(lay.step)]

        def line(dx, dw, dy, *_):
            self.line(lay.kernel, where[x] + dx, where[w] + dw, where[out] + dy, lay.m, lay.k, lay.n,
                      *steps, zx, zw, mul, shift, zo)  # fmt: skip

        self._looped(lay.loops, line)

    def _matmul(self, unit, lay, x, w, where, out, rows, sx, zx, zo):
        """A product with weights: by output channel of every matrix of a batch."""
        op = unit.op
        whole = np.asarray(self.fixed(w), np.float64).transpose(lay.weights)
        channels = whole.size // lay.k
        codes, scale = self._factored(op, w, whole, lay)
        bias = None
        if unit.bias is not None:
            flat = np.asarray(self.policy.env[unit.bias], np.float64)
            bias = np.broadcast_to(flat, self.tensors[out].shape).reshape(-1, channels)[-1]
        own = self._own_matrix(unit, w, rows)
        w, b, mul, sh = self._weights(op, codes.reshape(channels, lay.k), scale.ravel(), sx, out, bias)
        if own:
            each = lay.times * lay.n  # channels of the row's matrix
            w, mul, sh = f"{w} + {own} * {each * lay.k}", f"{mul} + {own} * {each}", f"{sh} + {own} * {each}"
        steps = [] if lay.kernel == "matmul" else [self._numbers(lay.step)]
        # a step of a weight is k times that of its channel's multiplier
        loops = [(size, a, c, c // lay.k, d) for size, a, c, d in lay.loops]

        def line(dx="", dw="", dc="", dy=""):
            own = [where[x] + dx, w + dw, f"{b}{dc}" if b else 0, mul + dc, sh + dc, where[out] + dy]
            last = [self.policy.low, self.policy.high] if lay.kernel == "matmul" else []
            self.line(lay.kernel, *own, lay.m, lay.k, lay.n, *steps, -zx, zo, *last)

        self._looped(loops, line)

    def _own_matrix(self, unit, w, rows):
        """C of the number of the matrix that row r is multiplied by, "" where all rows have the same."""
        if rows == 1 or not unit.perm:
            return ""
        axes = unit.op.attrs["dimension_numbers"][1][w == unit.op.inputs[1]]
        shape, terms = self.tensors[w].shape, []
        for n, axis in enumerate(axes):
            if axis in (cut := matrix_of_row(self.units, unit, rows)):
                d, s = cut[axis]
                terms.append(f"r / {d} % {s} * {prod(shape[a] for a in axes[n + 1 :])}")
        return f"({' + '.join(terms)})" if terms else ""

    def _factored(self, op, w, whole, lay):
        """(codes [B, N, K], scale [B, N]) of weights as the executor has them, B matrices of a batch."""
        (_, _), (lb, _) = op.attrs["dimension_numbers"]
        flat = whole.reshape(prod(whole.shape[: len(lb)]), -1, lay.k)
        if lay.turned:
            codes, scale = self.policy.factor(w, flat, (0, 1))
        else:
            codes, scale = self.policy.factor(w, flat.swapaxes(1, 2), (0, 2))
            codes = codes.swapaxes(1, 2)
        return codes.astype(np.int64), np.broadcast_to(np.reshape(scale, (len(flat), -1)), flat.shape[:2])

    def _conv(self, unit, where, shapes, out):
        op, p = unit.op, self.policy
        x, w = op.inputs[:2]
        if w not in self.units.static or x in self.units.static:
            self.refuse(op, "emit_c convolves with weights")
        lay = conv_layout(op, shapes[x], shapes[w], shapes[out])
        rhs = op.attrs["rhs_spec"]
        codes, scale = p.factor(w, np.asarray(self.fixed(w), np.float64), (rhs[0],))
        codes = codes.transpose(rhs[0], *rhs[2:], rhs[1]).reshape(lay.channels, -1)
        bias = None
        if unit.bias is not None:
            flat = np.asarray(p.env[unit.bias], np.float64)
            bias = np.broadcast_to(flat, self.tensors[out].shape).reshape(-1, lay.channels)[-1]
        (sx, zx), (_, zo) = p.grid(x), p.grid(out)
        scale = np.broadcast_to(np.ravel(scale), (lay.channels,))
        w, b, mul, sh = self._weights(op, codes, scale, sx, out, bias)
        loops = [lay.batch] if lay.batch[0] > 1 else []

        def line(dx="", dy="", *_):
            self.line(lay.kernel, where[x] + dx, w, b, mul, sh, where[out] + dy,
                      self._numbers(lay.d), -zx, zo)  # fmt: skip

        self._looped(loops, line)

    # Kernels of several operands

    def _parts(self, op, inputs, where, shapes, out, rows=1):
        """[(where, scale, zero point)] of operands: static ones on a grid of their own, in flash."""
        parts = []
        for i in inputs:
            if i in self.units.static:
                x = np.asarray(self.fixed(i), np.float64)
                x = x.ravel()[:1] if x.size == 1 else np.broadcast_to(x, self.tensors[out].shape)
                codes, scale, zero = self.policy.operand(i, x, out)
                own = f" + r * {prod(shapes[out])}" if rows > 1 and codes.size > 1 else ""
                parts.append((self.constant(codes, self.ctype) + own, scale, zero))
            else:
                parts.append((where[i], *self.policy.grid(i)))
        return parts

    def _broadcast(self, op, inputs, shapes, out):
        """(loops, n, steps) of operands that broadcast; a static one is stored whole or once."""
        own = []
        for i in inputs:
            held = i not in self.units.static
            own.append(shapes[i] if held else (1,) if self.tensors[i].size == 1 else shapes[out])
        return broadcast_layout(own, shapes[out])

    def _two(self, op, where, shapes, out, rows):
        if op.prim in ("max", "min"):
            self._extreme(op, where, shapes, out, rows)
            return
        so, zo = self.policy.grid(out)
        (a, sa, za), (b, sb, zb) = self._parts(op, op.inputs, where, shapes, out, rows)
        loops, n, (da, db) = self._broadcast(op, op.inputs, shapes, out)
        params, p = self.policy.pair_params(op.prim, sa, sb, so), self.policy
        if op.prim == "mul":
            name, rest = "mul", (-za, -zb, *params, zo)
        elif op.prim == "div":
            name, rest = "divide", (za, zb, *params, zo)
        else:
            name, rest = (
                "add",
                (-za, *params[:2], -zb, *params[2:4], p.left_shift, zo, *params[4:], p.low, p.high),
            )
        line = lambda x, y, z, *_: self.line(name, a + x, da, b + y, db, where[out] + z, n, *rest)
        self._looped(loops, line)

    def _scaled(self, i, where, shapes, out, rows):
        """(where, offset, multiplier, shift) that bring an operand onto the grid of the result."""
        so, zo = self.policy.grid(out)
        if i in self.units.static:
            codes = self.policy.codes(out, self.fixed(i))
            if codes.size > 1:
                codes = np.broadcast_to(codes, self.tensors[out].shape)
            own = f" + r * {prod(shapes[out])}" if rows > 1 and codes.size > 1 else ""
            return self.constant(codes, self.ctype) + own, -zo, *SAME_SCALE
        scale, zero = self.policy.grid(i)
        if (scale, zero) == (so, zo):
            return where[i], -zo, *SAME_SCALE
        return where[i], -zero, *rescaler(scale / so, self.policy.bits)

    def _extreme(self, op, where, shapes, out, rows):
        (a, oa, ma, sa), (b, ob, mb, sb) = (self._scaled(i, where, shapes, out, rows) for i in op.inputs)
        loops, n, (da, db) = self._broadcast(op, op.inputs, shapes, out)
        rest = (oa, ma, sa, ob, mb, sb, self.policy.grid(out)[1], -int(op.prim == "min"))
        self._looped(
            loops, lambda x, y, z, *_: self.line("extreme", a + x, da, b + y, db, where[out] + z, n, *rest)
        )

    def _select(self, unit, where, shapes, out):
        op = unit.op
        which, *cases = op.inputs
        if len(cases) != 2:
            self.refuse(op, "emit_c chooses between two tensors")
        if which in self.units.static:
            mask = np.broadcast_to(np.asarray(self.fixed(which)).astype(np.uint8), self.tensors[out].shape)
            mask = self.constant(mask, "uint8_t")
        elif self.tensors[which].dtype == "bool":
            mask = where[which]
        else:
            self.refuse(op, "emit_c chooses by flags")
        (a, oa, ma, sa), (b, ob, mb, sb) = (self._scaled(i, where, shapes, out, 1) for i in cases)
        loops, n, (dm, da, db) = self._broadcast(op, op.inputs, shapes, out)
        rest = (oa, ma, sa, ob, mb, sb, self.policy.grid(out)[1])

        def line(m="", x="", y="", z=""):
            self.line("select", mask + m, dm, a + x, da, b + y, db, where[out] + z, n, *rest)

        self._looped(loops, line)

    def _reduce(self, op, where, shapes, out):
        i, p = op.inputs[0], self.policy
        axes, rank = sorted(op.attrs["axes"]), len(shapes[i])
        real = [d for d in axes if shapes[i][d] > 1] or axes[:1]
        length = prod(shapes[i][d] for d in axes)
        first, rest = prod(shapes[i][: real[0]]), prod(shapes[i][real[-1] + 1 :])
        if first * length * rest != prod(shapes[i]):
            self.refuse(op, "emit_c reduces neighbouring axes only")
        if op.prim == "reduce_sum":
            (scale, zero), (so, zo) = p.grid(i), p.grid(out)
            m, shift = (int(v) for v in multiplier(scale / so))
        flip = -int(op.prim in ("reduce_min", "reduce_and"))
        kind = "" if is_float(self.tensors[i].dtype) else "_s8"
        if rest == 1 or real[-1] == rank - 1:
            if op.prim == "reduce_sum":
                self.line("reduce_sum", where[i], where[out], first, length, -zero, m, shift, zo)
            else:
                self.line(f"reduce_max{kind}", where[i], where[out], first, length, flip)
            return
        loops = [(first, length * rest, rest)] if first > 1 else []
        if op.prim == "reduce_sum":
            line = lambda x="", y="", *_: self.line("sum_down", where[i] + x, where[out] + y, rest, length,
                                                    -zero, m, shift, zo)  # fmt: skip
        else:
            d = self._numbers((length, 1, rest, 1, 1, length, 1, 1, 1, 0, 0, 1, 1))
            line = lambda x="", y="", *_: self.line(
                f"window_max{kind}", where[i] + x, where[out] + y, d, flip
            )
        self._looped(loops, line)

    def _window(self, op, where, shapes, out):
        p, i = self.policy, op.inputs[0]
        kind = op.attrs.get("combine") or op.prim.removeprefix("reduce_window_")
        kind = {"add": "sum"}.get(kind, kind)
        if kind not in ("max", "min", "sum"):
            self.refuse(op, f"emit_c has no C for windows of {kind!r}")
        if len(op.inputs) > 1:
            start = float(np.ravel(self.fixed(op.inputs[1]))[0])
            if start != {"max": -np.inf, "min": np.inf, "sum": 0.0}[kind]:
                self.refuse(op, "emit_c has windows that start with nothing")
        lay = window_layout(op, shapes[i], shapes[out])
        d, whole = self._numbers(lay.d), prod(lay.d[:3])
        loops = [(lay.outer, whole, lay.n)] if lay.outer > 1 else []
        (scale, zero), (so, zo) = p.grid(i), p.grid(out)
        m, shift = (int(v) for v in multiplier(scale / so))
        rest = (-zero, m, shift, zo) if kind == "sum" else (-int(kind == "min"),)
        name = "window_sum" if kind == "sum" else "window_max"
        self._looped(loops, lambda x="", y="", *_: self.line(name, where[i] + x, where[out] + y, d, *rest))
