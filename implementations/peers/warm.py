"""Compiles a peer's kernels ahead: what autotuning will try does not depend on batch or length."""

import sys
from importlib import import_module
from typing import Any

from mambench.harness.spec import Case
from mambench.implementations import warm
from mambench.implementations.base import Implementation

_TOKENS = 512  # two chunks of the longest chunk size


def call_once(implementation: Implementation, case: Case) -> None:
    """Run a case's pass at batch 1 and at most 512 tokens on the current GPU."""
    warm.call_once(implementation, case, batch=1, tokens=_TOKENS)


def forget_tuning(package: str) -> int:
    """Let what a package's kernels are tuned to be chosen anew; returns how many kernels that are.

    The keys of its autotuning hold neither batch nor length: without this a worker would time every
    case with what was best for the first one, and a cache on disk with what was best at 512 tokens.
    """
    try:
        tuner_kind: type = import_module("triton.runtime.autotuner").Autotuner
    except ImportError:
        return 0
    tuned: set[Any] = set()
    for name, module in list(sys.modules.items()):
        if name == package or name.startswith(f"{package}."):
            tuned |= {
                t for value in list(vars(module).values()) for t in _layers(value, tuner_kind)
            }
    for tuner in tuned:
        tuner.cache.clear()
        tuner.cache_results = False
    return len(tuned)


def _layers(kernel: Any, kind: type) -> list[Any]:
    """Return the layers of a decorated kernel that are of a kind, from the outside in."""
    found: list[Any] = []
    for _ in range(8):  # heuristics, autotuning and the kernel, each around the next as `fn`
        if isinstance(kernel, kind):
            found.append(kernel)
        if not type(kernel).__module__.startswith("triton."):
            break
        kernel = getattr(kernel, "fn", None)
    return found
