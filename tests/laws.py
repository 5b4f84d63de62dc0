"""Turns what a technique lists into tests: its laws, plain functions without pytest, and its bad inputs."""

import pytest


def law_tests(module):
    """{"test_<slug>_...": law} for every `law_<slug>_...` function of a laws module."""
    laws = {n: f for n, f in vars(module).items() if n.startswith("law_")}
    if not laws:
        raise ValueError(f"{module.__name__} holds no law")
    return {n.replace("law_", "test_", 1): f for n, f in laws.items()}


def rejects(bad, error=ValueError):
    """A test that every call of {name: (call, message)} raises `error` with that message."""

    @pytest.mark.parametrize("name", bad)
    def test(name):
        call, message = bad[name]
        with pytest.raises(error, match=message):
            call()

    return test
