"""What the tests of the two convolution-and-attention pyramids share."""

from functools import wraps

import numpy as np


class Shapes:
    """Stands for a Generator where only shapes matter."""

    standard_normal = staticmethod(lambda shape: np.broadcast_to(0.0, shape))
    uniform = staticmethod(lambda low, high, shape: np.broadcast_to(0.0, shape))


def released(forward):
    """The network for parameters as released: its last linear maps are stored [out, in]."""
    turn = lambda head: None if head is None else head._replace(w=head.w.T)

    @wraps(forward)  # the annotations say which trees to build
    def run(img, params, cfg, **options):
        params = params._replace(head=turn(params.head), head_dist=turn(params.head_dist))
        return forward(img, params, cfg, **options)

    return run


def config_of(cls):
    """A function from stored fields, lists where there are tuples, to a configuration."""
    return lambda fields: cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
