"""The exercises of the chapter on distillation: a stub for the reader, what its solution must do, a solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""

# --8<-- [start:soft_gradient]
import numpy as np


def softmax(z):
    p = np.exp(z - z.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def soft_gradient(student, teacher, T):
    """Gradient of the mean over rows of KL(p_t || p_s) with respect to the student's
    logits, both [B, K] and softened by T. As it stands it is that of T = 1.
    """
    return (softmax(student) - softmax(teacher)) / len(student)
    # --8<-- [end:soft_gradient]


# --8<-- [start:solve_soft_gradient]
def solve_soft_gradient(student, teacher, T):
    def soft(z):
        p = np.exp(z / T - (z / T).max(axis=-1, keepdims=True))
        return p / p.sum(axis=-1, keepdims=True)

    return (soft(student) - soft(teacher)) / (T * len(student))
    # --8<-- [end:solve_soft_gradient]


def check_soft_gradient(soft_gradient):
    """The slope of the library's loss, by central differences."""
    from ref.compression.distillation import soft_kl

    rng = np.random.default_rng(0)
    for T in (1.0, 2.0, 5.0):
        s, t = 2 * rng.standard_normal((2, 3, 4))
        got = np.asarray(soft_gradient(s, t, T))
        assert got.shape == s.shape, f"the gradient has shape {got.shape}, not {s.shape}"
        for i, j in ((0, 0), (1, 2), (2, 3)):
            step = np.zeros_like(s)
            step[i, j] = 1e-5
            slope = (soft_kl(s + step, t, temperature=T)[0] - soft_kl(s - step, t, temperature=T)[0]) / 2e-5
            # differences of numbers near 1 over 2e-5: eps / 1e-5 is 2e-11
            assert abs(got[i, j] - slope) < 1e-8, f"{T = }: the slope is {slope:.5f}, not {got[i, j]:.5f}"


# --8<-- [start:sources]
def sources(teacher_layers, student_layers):
    """(attention, hidden): for each student layer the teacher layer whose attention
    it learns, and for each of its student_layers + 1 states (0 = embeddings) the
    teacher's state. As it stands attention takes the first of each group.
    """
    p = teacher_layers // student_layers
    return [i * p for i in range(student_layers)], [i * p for i in range(student_layers + 1)]
    # --8<-- [end:sources]


# --8<-- [start:solve_sources]
def solve_sources(teacher_layers, student_layers):
    p = teacher_layers // student_layers
    return [i * p + p - 1 for i in range(student_layers)], [i * p for i in range(student_layers + 1)]
    # --8<-- [end:solve_sources]


def check_sources(sources):
    """Layers are numbered from 0; what student layer i reads and writes are states i and i + 1."""
    from ref.compression.distillation import layer_map

    for big, small in ((12, 4), (12, 6), (24, 3), (5, 5)):
        got, want = sources(big, small), layer_map(big, small)
        for name, a, b in zip(("attention", "hidden states"), got, want, strict=True):
            assert list(a) == list(b), f"{big} layers to {small}: {name} come from {list(b)}, not {list(a)}"


# --8<-- [start:hot_limit]
def hot_limit(student, teacher):
    """What T^2 KL(p_t || p_s) tends to for T to infinity, one row of K logits each.
    As it stands logits are compared as they are.
    """
    return ((student - teacher) ** 2).sum() / (2 * len(student))
    # --8<-- [end:hot_limit]


# --8<-- [start:solve_hot_limit]
def solve_hot_limit(student, teacher):
    gap = student - teacher
    return ((gap - gap.mean()) ** 2).sum() / (2 * len(student))
    # --8<-- [end:solve_hot_limit]


def check_hot_limit(hot_limit):
    """The library's loss at T = 10,000; adding a constant to the logits must not matter."""
    from ref.compression.distillation import soft_kl

    rng = np.random.default_rng(1)
    for shift in (0.0, 3.0):
        s, t = rng.uniform(-5, 5, (2, 6))
        want = 1e8 * soft_kl(s[None] + shift, t[None], temperature=1e4)[0]
        got = hot_limit(s + shift, t)
        # the next term is of order max|z| / T = 1e-3 of it; 1e8 eps of rounding
        assert abs(got - want) < 5e-3 * want + 1e-6, f"the limit is {want:.4f}, not {got:.4f}"
