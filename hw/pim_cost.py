"""Prices of ops on a `Pim`: products in the banks by their commands, everything else beside them."""

from dataclasses import replace
from functools import lru_cache
from math import ceil, prod

from hw.errors import UnsupportedPrimitive
from hw.pim_cycles import batch_cycles, kernel_cycles
from hw.pim_place import VALUE_BYTES
from hw.pim_schedule import matvec_timeline
from hw.program import CollectiveDims, ConvDims, ElementwiseDims, Kernel, Loop, MatmulDims, is_float, walk
from hw.report import OpCost

TRANSCENDENTAL_OPS = 14  # range reduction, a polynomial of order 6, scaling: half adds, half multiplies
DIV_OPS = 8  # a seed and three Newton steps


class Prices:
    """The rules of a `Pim`, by kind of op."""

    def cost(self, op, ctx):
        """Price of one execution of `op`. Raises: UnsupportedPrimitive."""
        d = op.dims
        if isinstance(d, CollectiveDims):
            raise UnsupportedPrimitive(
                op.prim, ctx.shape(op), op.scope, op.source, f"{self.name} is one machine: no collectives"
            )
        if isinstance(d, ConvDims):
            k, n = d.in_channels // d.groups * prod(d.kernel), d.out_channels // d.groups
            d = MatmulDims(d.groups, n, d.batch * prod(d.out_spatial), k)  # the kernels are the left operand
            return self._product(op, ctx, d, ctx.inputs(op)[::-1])
        if isinstance(d, MatmulDims):
            return self._product(op, ctx, d, ctx.inputs(op)[:2])
        if op.kind == "gather" and self._resident(op.inputs[0], ctx) and self.placement != "host":
            return self._gather(op, ctx)
        if op.prim in PASSED and self._resident(op.outputs[0], ctx) and self.placement != "host":
            return self._in_place(op, ctx)
        if op.prim in ("add", "mul") and op.kind == "elementwise" and self._both_resident(op, ctx):
            return self._elementwise(op, ctx)
        return self._outside(op, ctx)

    def _resident(self, i, ctx):
        """Does a tensor lie in the banks: a weight, a constant, a view, slice or update of one."""
        key = ("resident", i)
        if key not in ctx.memo:
            ctx.memo[key] = _lies_in_banks(ctx, i)
        return ctx.memo[key]

    def _both_resident(self, op, ctx):
        a, b = ctx.inputs(op)
        return a.shape == b.shape and all(self._resident(t.id, ctx) for t in (a, b))

    def _product(self, op, ctx, d, operands):
        """b products [m, k] x [k, n]: in the banks with either operand there, or outside; the fastest. With
        placement="single_channel" in the banks if they can.
        """
        c = ctx.counts(op)
        if not c.macs:
            return self._outside(op, ctx)
        dtype = operands[0].dtype
        if dtype in ("float64", "complex64", "complex128"):
            raise UnsupportedPrimitive(
                op.prim, ctx.shape(op), op.scope, op.source,
                f"{self.name} computes in {self.fmt}: no unit for {dtype}",
            )  # fmt: skip
        ways = []
        if is_float(dtype) and self.placement != "host":
            for tensor, m, batch in ((operands[1], d.n, d.m), (operands[0], d.m, d.n)):
                written = 0 if self._resident(tensor.id, ctx) else d.b * m * d.k * VALUE_BYTES
                ways.append(self._in_banks(d.b, m, d.k, batch, written, c))
        if self.asic is not None and not (ways and self.placement == "single_channel"):
            ways.append(self._outside(op, ctx, product=d, operands=operands))
        if not ways:
            raise UnsupportedPrimitive(
                op.prim, ctx.shape(op), op.scope, op.source,
                f"{self.name} has no unit for {dtype} products in its banks and no asic beside them",
            )  # fmt: skip
        return min(ways, key=lambda w: sum(w.busy_s.values()))

    def _in_banks(self, b, m, k, batch, written, c):
        """b times `batch` vectors of k inputs against m outputs each, after `written` bytes of weights."""
        whole = self if self.placement != "single_channel" else _one_channel(self)
        choices = [(b, whole)]
        if b > 1 and whole.channels > 1:  # a channel a product: one vector is broadcast in each
            choices.append((ceil(b / whole.channels), _one_channel(self)))
        rounds, used = min(choices, key=lambda r: r[0] * _batch_cycles(m, k, r[1], batch))
        t = matvec_timeline(m, k, used)
        ticks = rounds * _batch_cycles(m, k, used, batch)
        busy_channels = used.channels * (b / rounds if used.channels < whole.channels else 1)
        vectors = rounds * batch * busy_channels  # of one channel
        internal = vectors * t.mac * self.units * self.column_bytes
        pins = vectors * (t.broadcast + t.drain) * self.column_bytes + written
        write_s = written / self.pin_rate
        seconds, e = ticks * self.tick_s, self.energy
        opened = t.activate * (1 if batch > 1 and self.batch_reuse and self.order != "register" else batch)
        share = t.active_cycles / t.cycles
        power = share * e.open_mw + (1 - share) * e.closed_mw
        joules = 1e-12 * (
            opened * rounds * busy_channels * self.banks * e.act_pj
            + internal / self.column_bytes * e.mac_pj
            + pins * 8 * e.pin_pj_per_bit
            + written / self.column_bytes * e.write_pj
            + ticks / self.t_refi * self.refresh * self.channels * e.refresh_pj
        ) + 1e-3 * self.channels * (
            power * seconds + e.open_mw * write_s + e.controller_mw * (seconds + write_s)
        )
        busy = {"banks": seconds + write_s}  # one after the other
        return OpCost(
            busy_s=busy,
            energy_j=joules,
            bytes_by_level={"banks": internal, "pins": pins},
            macs=c.macs,
            flops=c.flops,
            basis="commands of one channel, replayed",
        )

    def _outside(self, op, ctx, product=None, operands=()):
        """The op on the vector unit beside the banks, its bytes over the pins or in the scratchpad."""
        c, a = ctx.counts(op), self.asic
        work = c.flops + c.transcendentals + c.index_ops
        if product is not None:
            moved = sum(t.size for t in operands) * VALUE_BYTES + ctx.writes(op) * _narrow(ctx.outputs(op))
        else:
            moved = ctx.reads(op) * _narrow(ctx.inputs(op)) + ctx.writes(op) * _narrow(ctx.outputs(op))
            moved += self._from_views(op, ctx)
        if not work and not moved:
            return OpCost()
        if a is None:
            raise UnsupportedPrimitive(
                op.prim, ctx.shape(op), op.scope, op.source,
                f"{self.name} has nothing beside its banks: give it asic=Asic(...)",
            )  # fmt: skip
        from_banks = sum(t.size for t in operands if self._resident(t.id, ctx)) * VALUE_BYTES
        near = 0
        if a.sram_kb and moved - from_banks <= a.sram_kb * 1024:
            near, moved = moved - from_banks, from_banks
        adds, muls = self._operations(op, c)
        if not work:  # a movement in the scratchpad passes through the lanes
            adds = near / VALUE_BYTES
        arithmetic = (ceil(adds / a.adders) + ceil((muls + c.macs) / a.multipliers)) / (a.ghz * 1e9)
        pins_s = moved / self.pin_rate / (1 - self.t_rfc / self.t_refi if self.refresh else 1)
        busy = {r: s for r, s in (("asic", arithmetic), ("pins", pins_s)) if s > 0}
        e, seconds = self.energy, max(busy.values(), default=0.0)
        power = e.open_mw if moved else e.closed_mw
        joules = (
            1e-12 * moved * (8 * e.pin_pj_per_bit + e.read_pj / self.column_bytes)
            + a.watts * arithmetic
            + 1e-3 * self.channels * (power + e.controller_mw) * seconds
        )
        return OpCost(
            busy_s=busy,
            energy_j=joules,
            bytes_by_level={k: v for k, v in (("pins", moved), ("sram", near)) if v},
            macs=c.macs,
            flops=c.flops,
            high=sum(busy.values()) / seconds if seconds else 1.0,
            basis="lanes and pins, side by side",
        )

    def _operations(self, op, c):
        """(additions, multiplications) of an op that is no product."""
        plain = c.flops - 2 * c.macs
        adds, muls = plain + c.index_ops, c.transcendentals * (TRANSCENDENTAL_OPS // 2)
        if isinstance(op.dims, Kernel):
            return adds + muls, muls
        if isinstance(op.dims, ElementwiseDims):
            if op.dims.cls == "div":
                adds, muls = adds * DIV_OPS // 2, muls + plain * DIV_OPS // 2
            elif op.prim in ("mul", "square", "integer_pow"):
                adds, muls = adds - plain, muls + plain
        return adds + c.transcendentals * (TRANSCENDENTAL_OPS // 2), muls

    def _gather(self, op, ctx):
        """Rows of a table in the banks: an activate and its columns for every index, over the pins."""
        index = ctx.inputs(op)[1]
        written = op.dims.written
        rows = max(1, index.size // max(index.shape[-1] if index.shape else 1, 1))
        columns = rows * max(1, ceil(written / rows * VALUE_BYTES / self.column_bytes)) if written else 0
        in_row = max(1, ceil(columns / rows)) if rows else 0
        once = max(self.t_act_read + (in_row - 1) * self.t_burst + self.t_rtp, self.t_ras) + self.t_rp
        # Activates of different banks overlap; a bank works one row at a time, the pins one column.
        ticks = max(
            ceil(rows / (self.channels * self.banks)) * once, ceil(columns / self.channels) * self.t_burst
        )
        seconds, e = (ticks + self.t_cl) * self.tick_s, self.energy
        moved = columns * self.column_bytes
        joules = (
            1e-12 * (rows * e.act_pj + columns * e.read_pj + moved * 8 * e.pin_pj_per_bit)
            + 1e-3 * self.channels * (e.open_mw + e.controller_mw) * seconds
        )
        c = ctx.counts(op)
        return OpCost(
            busy_s={"pins": seconds}, energy_j=joules, bytes_by_level={"pins": moved}, macs=0, flops=c.flops,
            basis="row activates and columns",
        )  # fmt: skip

    def _in_place(self, op, ctx):
        """A view or a slice of stored data is an address; an update writes what is new over the pins, a row
        opened in every bank that it touches.
        """
        if op.prim != "dynamic_update_slice":
            return OpCost(basis="an address")
        update, e = ctx.inputs(op)[1], self.energy
        columns = max(1, ceil(update.size * VALUE_BYTES / self.column_bytes))
        rows = min(columns, self.channels * self.banks)
        write = max(self.t_act_write + self.t_cwl + self.t_burst + self.t_wr, self.t_ras) + self.t_rp
        ticks = max(ceil(columns / self.channels) * self.t_burst, 0) + write
        seconds, moved = ticks * self.tick_s, columns * self.column_bytes
        joules = 1e-12 * (rows * e.act_pj + columns * e.write_pj + moved * 8 * e.pin_pj_per_bit)
        joules += 1e-3 * self.channels * (e.open_mw + e.controller_mw) * seconds
        return OpCost(
            busy_s={"pins": seconds}, energy_j=joules, bytes_by_level={"pins": moved}, basis="row writes"
        )

    def _from_views(self, op, ctx):
        """Bytes of operands that are views of stored data made inside the op's fusion group: no one else
        is charged for them.
        """
        inside = {o for other in ctx.group(op).ops for o in other.outputs}
        views = {t.id: t for t in ctx.inputs(op) if t.id in inside and self._resident(t.id, ctx)}
        return sum(t.size * VALUE_BYTES if is_float(t.dtype) else t.nbytes for t in views.values())

    def _elementwise(self, op, ctx):
        """Both operands in the banks: three column streams there, or outside; the faster."""
        c, n = ctx.counts(op), ctx.outputs(op)[0].size
        seconds = kernel_cycles(op.prim, n, n, self).pim * self.tick_s if n else 0.0
        if self.asic is not None:
            outside = self._outside(op, ctx)
            if outside.longest_s < seconds:
                return outside
        columns, e = 3 * ceil(n / self.lanes), self.energy
        joules = 1e-12 * columns * e.mac_pj + 1e-3 * self.channels * (e.open_mw + e.controller_mw) * seconds
        return OpCost(
            busy_s={"banks": seconds}, energy_j=joules, bytes_by_level={"banks": columns * self.column_bytes},
            flops=c.flops, basis="column streams",
        )  # fmt: skip


def _narrow(tensors):
    """Bytes in the banks' format over bytes as the program stores them; integers keep theirs."""
    own = sum(t.nbytes for t in tensors)
    narrow = sum(min(t.size * VALUE_BYTES, t.nbytes) if is_float(t.dtype) else t.nbytes for t in tensors)
    return narrow / own if own else 1.0


@lru_cache(maxsize=4096)
def _batch_cycles(m, k, target, batch):
    """Ticks of a batch, rows reused or not, whichever is sooner."""
    apart = batch * matvec_timeline(m, k, target).cycles
    if batch == 1 or not target.batch_reuse:
        return apart
    return min(apart, batch_cycles(m, k, target, batch))


@lru_cache(maxsize=64)
def _one_channel(target):
    return replace(target, channels=1)


# Views, slices and updates of stored data: layout and rounding are chosen when the data is placed.
PASSED = frozenset(
    "reshape squeeze expand_dims transpose broadcast_in_dim convert_element_type slice dynamic_slice copy "
    "dynamic_update_slice optimization_barrier stop_gradient device_put reduce_precision".split()
)


def _lies_in_banks(ctx, i):
    """Walk up from a tensor through views and updates of stored data, and out of loop bodies."""
    tensors, made, outer = ctx.program.tensors, ctx.memo.get("made"), ctx.memo.get("outer")
    if made is None:
        made, outer = _origins(ctx.program)
        ctx.memo["made"], ctx.memo["outer"] = made, outer
    seen = set()
    while i not in seen:
        seen.add(i)
        if tensors[i].role in ("weight", "const"):
            return tensors[i].size > 1
        if i in outer:
            i = outer[i]
        elif i in made and made[i].prim in PASSED and made[i].inputs:
            i = made[i].inputs[0]
        else:
            return False
    return False


def _origins(program):
    """({tensor: op that makes it}, {input of a loop's or branch's body: what is handed in})."""
    made, outer = {}, {}
    for op in walk(program.body):
        made.update(dict.fromkeys(op.outputs, op))
        if isinstance(op.dims, Loop):
            handed = op.inputs[op.dims.cond_consts :]
            outer.update(zip(op.dims.body.inputs, handed, strict=False))
        elif op.kind == "branch":
            for block in op.blocks:
                outer.update(zip(block.inputs, op.inputs[1:], strict=False))
    return made, outer
