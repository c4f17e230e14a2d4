"""Causal softmax attention without the (L, L) matrix in memory, in the variants that exist.

`flash-attn` 4, 3 and 2 (Tri Dao's packages, where they are installed), the backends of torch's
`scaled_dot_product_attention`, and torch's FlexAttention with a causal mask of blocks, compiled.
Which of them can run is read from the device and from the installed distributions' metadata:
neither torch nor flash-attn is imported to find out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, ClassVar

from mambench.harness.spec import Case, Device, DeviceKind, DType, Family, Pass
from mambench.implementations import attention_decode
from mambench.implementations.base import Implementation, Variant

if TYPE_CHECKING:
    from torch import Tensor

    Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

_HALF = (DType.FP16, DType.BF16)
_FLOAT = (DType.FP32, DType.FP16, DType.BF16)
_ALL = tuple(DType)
_ALIGNMENT_BYTES = 16
_REFUSALS = ("No available kernel", "No viable backend")  # of torch's SDPA, on CUDA and on the CPU


@dataclass(frozen=True, kw_only=True)
class _Limits:
    """What a variant accepts on CUDA; `capabilities` are major versions, None: any."""

    dtypes: tuple[DType, ...]
    headdim: int | None = None  # largest
    aligned: bool = True  # a head's row must be a multiple of 16 bytes
    capabilities: tuple[int, ...] | None = None
    distributions: tuple[str, ...] = ()  # any of these must be installed
    major: str = ""  # major version that the distribution must have
    install: str = ""


_CUDA: dict[str, _Limits] = {
    "fa4": _Limits(
        dtypes=_HALF,
        headdim=256,
        capabilities=(9, 10, 11, 12),
        distributions=("flash-attn-4",),
        install="pip install flash-attn-4 (with CUDA 13: 'flash-attn-4[cu13]')",
    ),
    "fa3": _Limits(
        dtypes=_HALF,
        headdim=256,
        capabilities=(9,),
        distributions=("flash-attn-3",),
        install="build it: git clone https://github.com/Dao-AILab/flash-attention, then in its "
        "folder hopper/ `pip install --no-build-isolation .`",
    ),
    "fa2": _Limits(
        dtypes=_HALF,
        headdim=256,
        aligned=False,
        capabilities=(8, 9, 10, 11, 12),
        distributions=("flash-attn",),
        major="2",
        install="pip install flash-attn --no-build-isolation",
    ),
    "sdpa-cudnn": _Limits(dtypes=_HALF, headdim=256, capabilities=(8, 9, 10, 11, 12)),
    "sdpa-flash": _Limits(
        dtypes=_HALF, headdim=256, aligned=False, capabilities=(8, 9, 10, 11, 12)
    ),
    "sdpa-efficient": _Limits(dtypes=_FLOAT),
    "flex": _Limits(
        dtypes=_FLOAT,
        headdim=256,
        aligned=False,
        capabilities=(8, 9, 10, 11, 12),
        distributions=("triton", "pytorch-triton"),
        install="pip install triton",
    ),
    "sdpa-math": _Limits(dtypes=_ALL, aligned=False),
}

_MODULES = {"fa4": "flash_attn.cute", "fa3": "flash_attn_interface", "fa2": "flash_attn"}

# From Hopper on, torch's flash backend and flash-attn 2 are Ampere kernels that leave the newer
# matrix units idle; before it they are the ones written for the part.
_ORDER_HOPPER_ON = (
    *("fa4", "fa3", "sdpa-cudnn", "fa2", "sdpa-flash", "sdpa-efficient", "flex", "sdpa-math"),
)
_ORDER_BEFORE_HOPPER = (
    "fa2",
    "sdpa-flash",
    "sdpa-cudnn",
    "sdpa-efficient",
    "flex",
    "sdpa-math",
    "fa4",
    "fa3",
)
_ORDER_CPU = ("sdpa-flash", "sdpa-math")


class FlashAttention(Implementation):
    """FlashAttention in the best variant the device has; see `variants`."""

    name: ClassVar[str] = "flash_attention"
    families: ClassVar[tuple[Family, ...]] = (Family.ATTENTION,)
    summary: ClassVar[str] = "causal attention: flash-attn 4, 3, 2 or a backend of torch's SDPA"

    def variants(self, device: Device) -> tuple[Variant, ...]:
        """Return all variants, the fastest first; those that cannot run say why in their place."""
        if device.kind is DeviceKind.CPU:
            rest = tuple(name for name in _CUDA if name not in _ORDER_CPU)
            reason = "needs an NVIDIA GPU"
            return tuple(Variant(name=name) for name in _ORDER_CPU) + tuple(
                Variant(name=name, unavailable=reason) for name in rest
            )
        hopper_on = (device.compute_capability or (0, 0)) >= (9, 0)
        order = _ORDER_HOPPER_ON if hopper_on else _ORDER_BEFORE_HOPPER
        return tuple(Variant(name=name, unavailable=_unavailable(name, device)) for name in order)

    def op(self, family: Family, variant: str) -> "Attention":
        """Import and return the variant's `op(q, k, v)`.

        All tensors (B, L, H, P); causal, scale P ** -0.5.

        Raises:
            ValueError: the family is not attention, or there is no such variant.
            ImportError: the variant's library is not installed.
        """
        if family not in self.families:
            raise ValueError(f"{self.name} computes attention, not {family}")
        if variant.startswith("sdpa-"):
            return _sdpa(variant)
        if variant == "flex":
            from mambench.kernels.attention.flex import causal

            return causal()
        if variant not in _MODULES:
            raise ValueError(f"{self.name} has no variant {variant!r}; valid: {', '.join(_CUDA)}")
        return _flash_attn(import_module(_MODULES[variant]).flash_attn_func, causal=True)

    def decode_variants(self, device: Device) -> tuple[Variant, ...]:
        """Return the variants that decode, those made for it first."""
        known = {variant.name: variant for variant in self.variants(device)}
        on_cpu = device.kind is DeviceKind.CPU
        order = attention_decode.ORDER_CPU if on_cpu else attention_decode.ORDER
        return tuple(known[name] for name in order)

    def decode_op(self, family: Family, variant: str) -> Callable[..., Any]:
        """Import and return the variant's `op(q, k, v, k_cache, v_cache, context)`."""
        attention = None
        if variant.startswith("sdpa-"):
            attention = _sdpa(variant, is_causal=False)
        elif variant == "fa4":
            attention = _flash_attn(import_module(_MODULES[variant]).flash_attn_func, causal=False)
        return attention_decode.op(variant, attention)

    def unsupported(self, case: Case, device: Device) -> str | None:
        """Return why the variant declines this dtype, head dimension or feature, or None."""
        if device.kind is DeviceKind.CPU:
            return None
        limits, headdim = _CUDA[case.variant], case.problem.headdim or 0
        if case.dtype not in limits.dtypes:
            allowed = ", ".join(limits.dtypes)
            return f"{case.variant} takes {allowed}, got {case.dtype}"
        multiple = _ALIGNMENT_BYTES // case.dtype.itemsize
        if limits.aligned and headdim % multiple:
            return f"{case.variant} takes a headdim that is a multiple of {multiple}, got {headdim}"
        largest = _largest_headdim(case, limits, device)
        if largest is not None and headdim > largest:
            return f"{case.variant} takes a headdim of at most {largest} here, got {headdim}"
        return None

    def workspace_bytes(self, case: Case) -> int:
        """Estimate what is allocated besides inputs, output and gradients.

        The math backend holds (B, H, L, L) matrices, fp32 where the inputs are narrower: scores,
        probabilities and masks, two and a half in the forward and three and a quarter with the
        backward (counted by tracking its allocations). The others hold the log-sum-exp of each row,
        and in the backward an fp32 accumulator of grad_q and a sum of each row.
        """
        if case.pass_ is Pass.DECODE:
            return attention_decode.workspace_bytes(case)
        problem, needs_grad = case.problem, case.pass_.needs_grad
        rows = problem.tokens * problem.nheads
        if case.variant == "sdpa-math":
            matrix = rows * problem.length * max(case.dtype.itemsize, 4)
            return matrix * (13 if needs_grad else 10) // 4
        accumulator = 4 * problem.tokens * problem.d_inner if needs_grad else 0
        return accumulator + 4 * rows * (2 if needs_grad else 1)


def _largest_headdim(case: Case, limits: _Limits, device: Device) -> int | None:
    capability = device.compute_capability or (0, 0)
    if case.variant == "sdpa-cudnn" and capability != (9, 0):
        return 128  # torch admits 256 to cuDNN on Hopper alone
    if case.variant == "fa4" and capability[0] != 9:
        own_kernel = capability[0] in (10, 11) and case.problem.headdim == 256
        return 256 if own_kernel else 128
    return limits.headdim


def _unavailable(name: str, device: Device) -> str | None:
    """Return why the variant cannot run on this CUDA device, and what to do, or None."""
    limits, capability = _CUDA[name], device.compute_capability
    if limits.capabilities is not None and (
        capability is None or capability[0] not in limits.capabilities
    ):
        need = ", ".join(f"{major}.x" for major in limits.capabilities)
        got = "unknown" if capability is None else f"{capability[0]}.{capability[1]}"
        return f"needs compute capability {need}; {device.name} has {got}"
    if not limits.distributions:
        return None
    found = [installed for d in limits.distributions if (installed := _version(d)) is not None]
    if not found:
        return f"{limits.distributions[0]} is not installed: {limits.install}"
    if limits.major and not any(v.split(".")[0] == limits.major for v in found):
        return (
            f"{limits.distributions[0]} is version {found[0]}, {name} needs {limits.major}.x: "
            f"{limits.install}"
        )
    return None


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _flash_attn(flash_attn_func: Callable[..., Any], *, causal: bool) -> "Attention":
    """Fix the arguments that the three packages share; 3 and 4 may return (out, log-sum-exp)."""

    def attention(q: "Tensor", k: "Tensor", v: "Tensor") -> "Tensor":
        out: Tensor | tuple[Tensor, ...] = flash_attn_func(q, k, v, causal=causal)
        return out[0] if isinstance(out, tuple) else out

    return attention


def _sdpa(variant: str, *, is_causal: bool = True) -> "Attention":
    """Return torch's SDPA with one backend enabled and all others disabled.

    `torch.nn.attention.sdpa_kernel` does the same, at several times the cost of the launch it
    surrounds; the public flags it stands on are set here directly, and only when they
    differ. They are put back after the call, so a name never changes another's code.
    """
    from torch.backends import cuda as flags
    from torch.nn.functional import scaled_dot_product_attention

    backends = ("cudnn", "flash", "mem_efficient", "math")
    wanted = {
        "sdpa-cudnn": (True, False, False, False),
        "sdpa-flash": (False, True, False, False),
        "sdpa-efficient": (False, False, True, False),
        "sdpa-math": (False, False, False, True),
    }
    if variant not in wanted:
        raise ValueError(f"no SDPA backend for variant {variant!r}; valid: {', '.join(wanted)}")
    switches = [
        (getattr(flags, f"{name}_sdp_enabled"), getattr(flags, f"enable_{name}_sdp"), enabled)
        for name, enabled in zip(backends, wanted[variant], strict=True)
    ]

    def attention(q: "Tensor", k: "Tensor", v: "Tensor") -> "Tensor":
        changed = [(switch, enabled) for get, switch, enabled in switches if get() != enabled]
        for switch, enabled in changed:
            switch(enabled)
        try:
            out = scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=is_causal
            )
        except RuntimeError as error:
            if not any(refusal in str(error) for refusal in _REFUSALS):
                raise
            raise RuntimeError(
                f"torch's SDPA has no {variant} kernel for q {tuple(q.shape)} {q.dtype} on "
                f"{q.device}; torch's warnings above say why. Try another variant."
            ) from error
        finally:
            for switch, enabled in changed:
                switch(not enabled)
        return out.transpose(1, 2)

    return attention
