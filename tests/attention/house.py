"""Goldens store weights [out, in] under names like q_w; the house has [in, out] under w_q. Both ways."""


def to_house(tree):
    """{"q_w": w, "q_b": b, ...} -> {"w_q": w.T, "b_q": b, ...}."""
    return {f"{n[-1]}_{n[:-2]}": _turn(n[-1], x) for n, x in tree.items()}


def to_golden(params):
    """The same back, for a tree with `_asdict`."""
    return {f"{n[2:]}_{n[0]}": _turn(n[0], x) for n, x in params._asdict().items()}


def _turn(kind, x):
    return x.T if kind == "w" and x is not None else x
