"""`Example`: a call of a core function on realistic input, shared by command line, tests and chapters."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Example:
    """`fn(*args, **kwargs)`, with the positions in args that one differentiates with respect to.

    fn: name of a core function of the technique. args: arrays or parameter trees. kwargs: options only, no
    arrays but masks. diff_args: () for a function that has no useful gradient (indices, integers, schedules).
    """

    fn: str
    args: tuple
    kwargs: dict = field(default_factory=dict)
    diff_args: tuple[int, ...] = ()
