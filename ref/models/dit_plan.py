"""A diffusion transformer's layers, the bits that ViDiT-Q gives them, and the bytes that this makes.

Source: Zhao et al. 2025 (arXiv 2406.02540), the released configurations.
"""

from ref.models.dit import DiTConfig


def published_plan(cfg: DiTConfig, steps_left, *, temporal_block=0):
    """{layer: (w_bits, a_bits)} of the paper's W4A8 video model with steps_left of 20 steps to go.

    19 to 15: all weights 8 bits; then attention at 4, the MLP at 8, and in the last five one temporal
    attention at 8 (which one its configuration names; here temporal_block). Activations have 8 bits.
    """
    if not 0 <= steps_left < 20:
        raise ValueError(f"steps_left must be in 0..19, got {steps_left}")
    early, plan = steps_left >= 15, {}
    for name in quantizable_names(cfg):
        _, block, part, _ = name.split(".")
        spared = part == "temporal" and int(block) == temporal_block and steps_left <= 4
        plan[name] = (8 if early or part == "mlp" or spared else 4, 8)
    return plan


def quantizable_names(cfg: DiTConfig):
    """The layers that are quantised, as `quantizable` names them."""
    parts = ["attn"] + ["temporal"] * (cfg.frames > 1) + ["cross"] * (cfg.text_dim is not None)
    inner = [f"{part}.{m}" for part in parts for m in "qkvo"] + ["mlp.fc1", "mlp.fc2"]
    return [f"blocks.{i}.{name}" for i in range(cfg.depth) for name in inner]


def vidit_q_bytes(cfg: DiTConfig, plan):
    """{part: bytes} of a network: planned weights, their grids, and everything else in 16 bits.

    A row's grid is delta and zero in 16 bits each. plan {layer: (w_bits, a_bits)}, {} for the 16-bit network.
    """
    C, out = cfg.dim, cfg.patch**2 * cfg.channels
    F = cfg.mlp_ratio * C
    sizes = {**dict.fromkeys("qkvo", (C, C)), "fc1": (F, C), "fc2": (C, F)}
    tokens = (cfg.side // cfg.patch) ** 2
    rest = 2 * out * C + C + out + (256 + C) * C + 2 * C + (cfg.classes + 1) * C + 2 * C * C + 2 * C
    rest += cfg.depth * (6 * C * C + 6 * C) + tokens * C + (cfg.frames * C if cfg.frames > 1 else 0)
    found = {"weights": 0, "grids": 0, "biases": 0, "other layers": 2 * rest}
    for name in quantizable_names(cfg):
        rows, columns = sizes[name.rsplit(".", 1)[1]]
        if ".cross.k" in name or ".cross.v" in name:
            columns = cfg.text_dim
        bits = plan[name][0] if name in plan else 16
        found["weights"] += rows * columns * bits // 8
        found["grids"] += 4 * rows * (name in plan)
        found["biases"] += 2 * rows
    return found
