"""What a vision transformer keeps for its backward pass, in bytes, and what fits a budget.

Source: counted from Pan et al. 2021 (arXiv 2111.11124), section 3.1; Chen et al. 2016 (arXiv 1604.06174) for
checkpointing. Plain arithmetic on sizes: no array is made.
"""

from dataclasses import dataclass

from ref.blocks.stored import stored_dtype


@dataclass(frozen=True)
class MesaConfig:
    """Sizes of a vision transformer that decide what it keeps: width, blocks, heads, tokens, MLP width."""

    dim: int
    depth: int
    num_heads: int
    tokens: int
    hidden: int | None = None  # 4 dim

    def __post_init__(self):
        if min(self.dim, self.depth, self.num_heads, self.tokens) < 1 or self.dim % self.num_heads:
            raise ValueError(f"sizes must be at least 1 and dim a multiple of num_heads, got {self}")


def activation_bytes(config, *, batch, policy="exact", itemsize=4, levels=256):
    """Bytes of activations that all blocks keep for the backward pass, by the operation that needs them.

    policy: "exact" keeps every tensor in itemsize bytes; "mesa" in one byte (two above 256 levels), and two
      float32 a head and tensor; both keep a norm's mean and deviation. "checkpoint" keeps the block's inputs,
      and needs the tensors of one block, exact, while it goes back. A tensor that serves two operations is
      counted once. Embedding, head and parameters are not counted.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    if policy not in ("exact", "mesa", "checkpoint"):
        raise ValueError(f'policy must be "exact", "mesa" or "checkpoint", got {policy!r}')
    c, rows = config, batch * config.tokens
    inner, hidden = rows * c.dim, rows * (c.hidden or 4 * c.dim)
    tensors = {  # elements of the tensors that each operation is the first to need
        "layer_norm": (inner, inner),
        "qkv": (inner,),
        "attention_scores": (inner, inner),
        "softmax": (batch * c.num_heads * c.tokens**2,),
        "attention_values": (inner,),
        "projection": (inner,),
        "fc1": (inner,),
        "gelu": (hidden,),
        "fc2": (hidden,),
    }
    if policy == "checkpoint":
        block = activation_bytes(config, batch=batch, itemsize=itemsize)
        return {"inputs": c.depth * inner * itemsize, "one_block": sum(block.values()) // c.depth}
    compressed = policy == "mesa"
    size = stored_dtype(levels).itemsize if compressed else itemsize
    ranges = 8 * c.num_heads if compressed else 0
    out = {op: c.depth * sum(n * size + ranges for n in each) for op, each in tensors.items()}
    out["layer_norm"] += c.depth * 2 * 2 * 4 * rows  # mean and deviation in float32, exact in every policy
    return out


def largest_batch(config, *, budget_bytes, policy, itemsize=4, levels=256):
    """The largest batch whose activations fit the budget. Raises: ValueError if not even one image does."""
    cost = lambda n: _total(config, n, policy, itemsize, levels)
    return _largest(cost, budget_bytes, "batch")


def largest_width(config, *, budget_bytes, batch, policy, itemsize=4, levels=256):
    """The largest dim, a multiple of num_heads, that fits the budget; the MLP keeps its ratio to dim.

    Raises: ValueError if not even one channel a head does.
    """
    ratio = (config.hidden or 4 * config.dim) / config.dim

    def cost(per_head):
        dim = per_head * config.num_heads
        wider = MesaConfig(dim, config.depth, config.num_heads, config.tokens, round(ratio * dim))
        return _total(wider, batch, policy, itemsize, levels)

    return config.num_heads * _largest(cost, budget_bytes, "dim / num_heads")


def _total(config, batch, policy, itemsize, levels):
    return sum(
        activation_bytes(config, batch=batch, policy=policy, itemsize=itemsize, levels=levels).values()
    )


def _largest(cost, budget, what):
    """The largest n >= 1 with cost(n) <= budget, cost rising."""
    if cost(1) > budget:
        raise ValueError(f"budget_bytes = {budget} does not hold {what} = 1, which takes {cost(1)}")
    high = 2
    while cost(high) <= budget:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    return low
