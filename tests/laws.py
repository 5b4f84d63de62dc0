"""Turns the laws of a technique, plain functions without pytest, into tests."""


def law_tests(module):
    """{"test_<slug>_...": law} for every `law_<slug>_...` function of a laws module."""
    laws = {n: f for n, f in vars(module).items() if n.startswith("law_")}
    if not laws:
        raise ValueError(f"{module.__name__} holds no law")
    return {n.replace("law_", "test_", 1): f for n, f in laws.items()}
