"""Compiles a peer's kernels ahead: what autotuning will try does not depend on batch or length."""

from mambench.harness.spec import Case
from mambench.implementations import warm
from mambench.implementations.base import Implementation

_TOKENS = 512  # two chunks of the longest chunk size


def call_once(implementation: Implementation, case: Case) -> None:
    """Run a case's pass at batch 1 and at most 512 tokens on the current GPU."""
    warm.call_once(implementation, case, batch=1, tokens=_TOKENS)
