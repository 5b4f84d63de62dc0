"""Cycles of a stream accelerator for transformers: pipelined loops over a few wide ports, in closed form.

A loop of `trips` iterations that starts one every cycle (initiation interval 1) takes `trips` cycles and its
depth once. One linear unit is shared by all dense layers; keys stream past a few resident queries; experts
run one after another, each loaded once. Source: the loops of Edge-MoE (arXiv 2305.18691), whose design has
ports of 256 bits, activations of 32, weights of 16, a unit of 16 x 16 products and 4 resident queries.
"""

from dataclasses import dataclass

BLOCK = 8  # activations that a 256 bit port hands over each cycle


@dataclass(frozen=True)
class StageCycles:
    """Cycles of one layer's parts, which run side by side: products, weights in, activations in, results
    out.
    """

    compute: int
    weights: int
    read: int
    write: int

    @property
    def stage(self) -> int:
        """The longest of computing, reading and writing: one dataflow stage, its depth left out."""
        return max(self.compute, self.read, self.write)

    @property
    def overlapped(self) -> int:
        """The same where the next layer's weights are loaded meanwhile into the other buffer."""
        return max(self.stage, self.weights)

    @property
    def serial(self) -> int:
        """One part after another."""
        return self.compute + self.weights + self.read + self.write


def linear_cycles(
    tokens, n_in, n_out, *, linear_in=16, linear_out=16, axi_bits=256, act_bits=32, weight_bits=16
) -> StageCycles:
    """Cycles of x [tokens, n_in] times w [n_out, n_in] on a unit of linear_in x linear_out products a cycle.

    Raises: ValueError naming a size below 1 (tokens may be 0), or a port narrower than a number.
    """
    _positive(n_in=n_in, n_out=n_out, linear_in=linear_in, linear_out=linear_out)
    if tokens < 0:
        raise ValueError(f"tokens must not be negative, got {tokens}")
    acts, weights = _beat(axi_bits, act_bits, "act_bits"), _beat(axi_bits, weight_bits, "weight_bits")
    return StageCycles(
        compute=tokens * _up(n_in, linear_in) * _up(n_out, linear_out),
        weights=n_out * _up(n_in, weights),
        read=tokens * _up(n_in, acts),
        write=tokens * _up(n_out, acts),
    )


def attention_steps(queries, keys, *, parallel=4) -> int:
    """Key loads while `parallel` queries are resident, each lane a key later than the one before it.

    keys floor((queries + P - 1) / P) + (queries + P - 1) mod P: in the last term the lanes that started late
    see the keys that they missed.
    """
    _positive(queries=queries, keys=keys, parallel=parallel)
    blocks, late = divmod(queries + parallel - 1, parallel)
    return keys * blocks + late


def attention_cycles(n, d, *, parallel=4, block=BLOCK) -> int:
    """Cycles of q k^T (or of p v) over n tokens of d numbers, all heads together, `block` a cycle.

    One key block is read a cycle whatever `parallel` is: more lanes need no more bandwidth.
    """
    _positive(d=d, block=block)
    return attention_steps(n, n, parallel=parallel) * _up(d, block)


def moe_cycles(
    lengths, n_in, hidden, *, linear_in=16, linear_out=16, axi_bits=256, weight_bits=16, act_bits=32
) -> int:
    """Cycles of expert networks n_in -> hidden -> n_in, whose tokens are queued: lengths [E].

    The larger of all products and of loading the weights of every expert that has a token, once.
    """
    loads = products = 0
    for tokens in lengths:
        for a, b in ((n_in, hidden), (hidden, n_in)):
            c = linear_cycles(
                int(tokens), a, b, linear_in=linear_in, linear_out=linear_out, axi_bits=axi_bits,
                act_bits=act_bits, weight_bits=weight_bits,
            )  # fmt: skip
            products += c.compute
            loads += c.weights if tokens else 0
    return max(products, loads)


def pipeline_cycles(items, stages) -> int:
    """Cycles of `items` equal pieces through stages that each take so many cycles a piece, buffers between.

    The first piece passes every stage, every further one waits for the slowest.
    """
    if items < 0 or not stages or min(stages) < 0:
        raise ValueError(f"need items >= 0 and stages of 0 cycles or more, got {items=}, {stages=}")
    return sum(stages) + (items - 1) * max(stages) if items else 0


def _up(n, per):
    return -(-n // per)


def _beat(axi_bits, bits, name):
    if not 1 <= bits <= axi_bits:
        raise ValueError(f"{name} must be in 1..{axi_bits}, the bits of a port, got {bits}")
    return axi_bits // bits


def _positive(**sizes):
    for name, n in sizes.items():
        if n < 1:
            raise ValueError(f"{name} must be positive, got {n}")
