"""The exercises of the chapter on the masked classifier of many problems: stubs, their checks, solutions.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""

# --8<-- [start:answer]
import numpy as np


def answer(z, own):
    """The class that wins among those of the request's problem: logits z [C], own
    [C] True where a class belongs to it. As it stands all others get the logit 0.
    """
    return int(np.argmax(z * own))
    # --8<-- [end:answer]


# --8<-- [start:solve_answer]
def solve_answer(z, own):
    return int(np.argmax(np.where(own, z, -np.inf)))  # 0 would beat every negative logit
    # --8<-- [end:solve_answer]


def check_answer(answer):
    """The library's prediction."""
    from hypothesis import given
    from hypothesis import strategies as st

    from ref.language.masked_multidomain import predict

    @given(st.lists(st.integers(-3, 3), min_size=5, max_size=5), st.integers(0, 1))
    def the_best_of_its_own(z, problem):
        z, own = np.array(z, float), np.array([True, True, False, False, False]) ^ bool(problem)
        want = int(predict(z[None], np.array([problem]), sizes=(2, 3))[0][0]) + 2 * problem
        got = answer(z, own)
        assert got == want, f"logits {z}, own {own}: class {want}, not {got}"

    the_best_of_its_own()


# --8<-- [start:slope]
import numpy as np


def slope(z, y, own):
    """The gradient [C] of the masked loss of one request: logits z [C], right class
    y, own [C] True where a class belongs to its problem (equation 6). As it stands
    the gradient of the full loss is cut off outside.
    """
    p = np.exp(z - z.max())
    p = p / p.sum()
    p[y] -= 1
    return p * own
    # --8<-- [end:slope]


# --8<-- [start:solve_slope]
def solve_slope(z, y, own):
    p = np.where(own, np.exp(z - z[own].max()), 0.0)
    p = p / p.sum()  # over the problem's classes only: they share all of the probability
    p[y] -= 1
    return p
    # --8<-- [end:solve_slope]


def check_slope(slope):
    """The library's gradient."""
    from ref.language.masked_multidomain import masked_loss_backward

    rng = np.random.default_rng(0)
    for n in range(10):
        z, problem = 2 * rng.standard_normal(5), n % 2
        own = np.array([True, True, False, False, False]) ^ bool(problem)
        y = int(rng.choice(np.flatnonzero(own)))
        want = masked_loss_backward(z[None], np.array([y]), np.array([problem]), sizes=(2, 3))[0]
        got = slope(z.copy(), y, own)
        # shares below 1, of five terms
        assert np.allclose(got, want, rtol=0, atol=1e-14), (
            f"logits {z.round(2)}, own {own}, class {y}: {want.round(3)}, not {np.round(got, 3)}"
        )


# --8<-- [start:answered]
import numpy as np


def answered(mass, right, threshold):
    """(share of the requests that are answered, share of errors among those), where
    a request is answered if its routing mass [n] reaches the threshold; right [n]
    says whose answer would be right. At least one is answered. As it stands
    errors are counted among all.
    """
    said = mass >= threshold
    return said.mean(), (said & ~right).mean()
    # --8<-- [end:answered]


# --8<-- [start:solve_answered]
def solve_answered(mass, right, threshold):
    said = mass >= threshold
    return said.mean(), (~right[said]).mean()
    # --8<-- [end:solve_answered]


def check_answered(answered):
    """The library's curve at each of its thresholds."""
    from hypothesis import given
    from hypothesis import strategies as st

    from ref.language.masked_multidomain import risk_coverage

    rows = st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=6)

    @given(rows)
    def the_curve(rows):
        mass, right = np.array([m for m, _ in rows]) / 4, np.array([r for _, r in rows])
        for threshold, coverage, risk in zip(*risk_coverage(mass, right), strict=True):
            got = answered(mass, right, threshold)
            # quotients of counts up to six
            assert np.allclose(got, (coverage, risk), rtol=0, atol=1e-14), (
                f"mass {mass}, right {right}, threshold {threshold}: {coverage:.3g} and {risk:.3g}, "
                f"not {got[0]:.3g} and {got[1]:.3g}"
            )

    the_curve()
