"""The refusals of `hw`: each says what was met, where, and what would help."""


class UnsupportedPrimitive(NotImplementedError):
    """A primitive that has no rule, named with its shape, its scope and its line of source."""

    def __init__(self, name, shape=(), scope="", source="", why="the op program has no rule for it"):
        self.name, self.shape, self.scope, self.source, self.why = name, tuple(shape), scope, source, why
        at = f" at {source}" if source else ""
        super().__init__(f"primitive {name!r} {list(shape)} in {scope or 'the top level'}{at}: {why}")


class UnknownTripCount(ValueError):
    """A while loop whose number of trips is not known before it runs."""

    def __init__(self, scope):
        self.scope = scope
        super().__init__(
            f"the while loop {scope!r} has an unknown trip count: pass "
            f"trace(..., trip_counts={{{scope!r}: n}}), or run it with execute, which counts"
        )


class NotTraceable(TypeError):
    """A function that JAX cannot trace because it needs the values of its arrays."""


class DynamicShape(ValueError):
    """A value whose shape is not known before the program runs."""


class SideEffect(ValueError):
    """A function that does something besides returning values: a callback, a print."""

    def __init__(self, name, scope="", source=""):
        self.name, self.scope, self.source = name, scope, source
        at = f" at {source}" if source else ""
        super().__init__(f"{name} in {scope or 'the top level'}{at} has a side effect, which has no price")


class NonConsecutiveRevisit(ValueError):
    """An output block of a kernel that is left and written again later, without being aliased to an input."""


class DoesNotFit(MemoryError):
    """More memory is needed than a region of the target has; `shortfall` bytes are missing."""

    def __init__(self, target, region, needed, available, live_tensors=(), suggestions=(), unit="B"):
        self.target, self.region, self.needed, self.available = target, region, int(needed), int(available)
        self.live_tensors, self.suggestions = tuple(live_tensors), tuple(suggestions)
        self.unit = unit  # "" for what is counted in pieces
        amount = lambda n: f"{n:,} {unit}".rstrip()
        shape = lambda s: f" {list(s)}" if s else ""
        biggest = ", ".join(f"{n}{shape(s)} {amount(b)}" for n, s, b in self.live_tensors[:3])
        hint = "; ".join(self.suggestions)
        super().__init__(
            f"{target}: {region} needs {amount(self.needed)} and has {amount(self.available)}, "
            f"{amount(self.shortfall)} short"
            + (f"; largest: {biggest}" if biggest else "")
            + (f"; would help: {hint}" if hint else "")
        )

    @property
    def shortfall(self):
        """Missing bytes."""
        return self.needed - self.available
