"""Compiles a peer's autotuned kernels ahead, and has them tuned at each case's own sizes.

A kernel with ten configurations is ten kernels to compile, each again for every specialisation of
its integer arguments (divisible by 16, equal to 1), and a backward pass has a dozen of them. Here a
pass is run with every launch of an autotuned kernel left out: no configuration is timed while other
compilers are at work, nothing depends on what was not computed, and any number of workers can
divide the configurations among themselves.
"""

import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any

from mambench.harness.spec import Case
from mambench.implementations import warm
from mambench.implementations.base import Implementation

CONFIGURATION_S = 1.1  # to compile one for Hopper, on one processor
TUNING_S = 0.1  # Triton's autotuner times one for about as long
_TUNED: dict[tuple[Any, str], dict[Any, Any]] = {}  # what each kernel was tuned to at which sizes


def compile_share(
    implementation: Implementation, case: Case, share: int | None, shares: int
) -> int:
    """Compile every `shares`-th configuration that a case's autotuning will try, from `share` on.

    With a share of None all are left out, and only what is not autotuned compiles. It needs a GPU
    only because the inputs are drawn there; without one nothing is done.

    Returns: how many configurations were compiled or found in the cache.
    """
    with compiling_only(share, shares) as compiled:
        warm.call_once(implementation, case)
    return len(compiled)


@contextmanager
def compiling_only(share: int | None = 0, shares: int = 1) -> Generator[list[str]]:
    """Let autotuned Triton kernels compile their configurations when called, and launch none.

    For a process that is thrown away: what such kernels should have computed is whatever was in
    memory. Yields a list to which each compiled kernel's name is appended.
    """
    autotuner: Any = import_module("triton.runtime.autotuner")
    compiler: Any = import_module("triton.compiler.errors")
    left_out = (  # by autotuning too
        autotuner.OutOfResources,
        autotuner.PTXASError,
        compiler.CompileTimeAssertionFailure,
    )
    compiled: list[str] = []
    numbers: dict[tuple[Any, int], int] = {}  # of each kernel's configurations, as they are met

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        configs = self.prune_configs(kwargs)
        self.best_config = configs[0]  # callers size what comes after by it
        for index, config in enumerate(configs):
            if numbers.setdefault((self, index), len(numbers)) % shares == share:
                with suppress(*left_out):
                    self.fn.run(*args, **(kwargs | config.all_kwargs() | {"warmup": True}))
                    compiled.append(self.base_fn.__name__)
        self.nargs = None

    tuner_kind: Any = autotuner.Autotuner
    usual, tuner_kind.run = tuner_kind.run, run
    try:
        yield compiled
    finally:
        tuner_kind.run = usual


def tune_for(package: str, case: Case) -> int:
    """Let a package's kernels be tuned at a case's own sizes; returns how many kernels that are.

    The keys of its autotuning hold neither batch nor length: without this a worker would time every
    case with what was best for the first one, and a cache on disk with what was best elsewhere.
    What was chosen for one pass holds for the others of the same sizes in this process.
    """
    tuners = _tuners(package)
    for tuner in tuners:
        tuner.cache = _TUNED.setdefault((tuner, repr((case.problem, case.dtype))), {})
        tuner.cache_results = False
    return len(tuners)


def _tuners(package: str) -> set[Any]:
    """Find the autotuners among the globals of a package's loaded modules."""
    try:
        kind: type = import_module("triton.runtime.autotuner").Autotuner
    except ImportError:
        return set()
    found: set[Any] = set()
    for name, module in list(sys.modules.items()):
        if name == package or name.startswith(f"{package}."):
            found |= {t for value in list(vars(module).values()) for t in _layers(value, kind)}
    return found


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
