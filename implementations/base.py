"""What an implementation is: metadata that needs no torch, and a loader of its operation.

An implementation's module imports torch, triton or numba only inside `op`, so that listing and
planning stay fast and work where they are not installed.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from mambench.harness.spec import Case, Device, Family


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way an implementation can run; named in the plan, so a name is always the same code."""

    name: str
    unavailable: str | None = None  # why it cannot run on this device, and what to install


class Implementation(ABC):
    """Something that is compared. Subclass it in any importable module and name the class.

    The operation that `op` returns has the signature of its family's reference interface:

    - s6: `op(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
      return_last_state=False)`; u, delta, z (B, D, L); A (D, N) fp32; B, C (B, G, N, L); D,
      delta_bias (D,) fp32. Returns out (B, D, L), or (out, last_state (B, D, N) fp32).
    - ssd: `op(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None,
      dt_softplus=False, dt_limit=(0.0, inf), return_final_states=False)`; x, z (B, L, H, P); dt
      (B, L, H); A (H,) fp32; B, C (B, L, G, N); D (H,) or (H, P) fp32; dt_bias (H,) fp32;
      initial_states (B, H, P, N). Returns out (B, L, H, P), or (out, final_states (B, H, P, N)
      fp32).
    - attention: `op(q, k, v)`, all (B, L, H, P); causal, softmax scale P ** -0.5. Returns
      (B, L, H, P).

    All are differentiable in every floating-point tensor argument. The pass `prefill` calls them
    with `return_last_state` or `return_final_states`; attention's keys and values are its cache as
    they are.

    `decode_op` returns the operation of one token, which changes the decoding state in place and is
    not differentiated. Every size is at least 1, tensors are contiguous, and the state has x's
    dtype unless the caller keeps it wider:

    - s6: `op(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False)`; state (B, D,
      N), updated; x, dt, z (B, D); A (D, N) fp32; B, C (B, G, N), a group serves D / G consecutive
      channels; D, dt_bias (D,) fp32. Returns out (B, D).
    - ssd: the same call; state (B, H, P, N), updated; x, z (B, H, P); dt (B, H); A (H,) fp32; B, C
      (B, G, N); D, dt_bias (H,) fp32. Returns out (B, H, P).
    - attention: `op(q, k, v, k_cache, v_cache, context)`; q, k, v (B, 1, H, P); k_cache, v_cache
      (B, S, H, P) with S > context. Writes k and v to position `context` of the caches, and attends
      to the positions up to and including it. Returns out (B, 1, H, P).
    """

    name: ClassVar[str]
    families: ClassVar[tuple[Family, ...]]
    summary: ClassVar[str]  # one line for `list`
    peer: ClassVar[bool] = False  # another project's operation: nothing is amiss without it

    @abstractmethod
    def variants(self, device: Device) -> tuple[Variant, ...]:
        """Return this implementation's variants for a device, the preferred one first."""

    @abstractmethod
    def op(self, family: Family, variant: str) -> Callable[..., Any]:
        """Import and return the operation of a variant."""

    def decode_variants(self, device: Device) -> tuple[Variant, ...]:
        """Return the variants of the pass `decode`, the preferred one first; (): it has none."""
        return ()

    def decode_op(self, family: Family, variant: str) -> Callable[..., Any]:
        """Import and return the one-token operation of a variant; see the class."""
        raise NotImplementedError(f"{self.name} has no decode operation")

    def begin_case(self, case: Case) -> None:  # noqa: B027 - optional
        """Prepare a worker for a case, once and before anything of it is built or called.

        What an earlier case left in the process (what its kernels were tuned to) is put away here.
        """

    def unsupported(self, case: Case, device: Device) -> str | None:
        """Return why this case cannot be run (limits of sizes or dtypes), or None."""
        return None

    def workspace_bytes(self, case: Case) -> int:
        """Estimate the memory needed beyond inputs, outputs and gradients (for the plan)."""
        return 0

    def compile_s(self, case: Case) -> float:
        """Estimate the seconds of one processor that compiling ahead takes, if nothing is cached.

        Of interest where it is many: what has them declares `precompile`, see harness/precompile.
        """
        return 0.0

    def tuning_s(self, case: Case) -> float:
        """Estimate the seconds a first call takes to time configurations against each other."""
        return 0.0

    def launches(self, case: Case) -> int:
        """Estimate how many operations a forward call launches in sequence (for the plan)."""
        return 10
