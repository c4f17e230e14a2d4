"""Finds out what an operation launches, without a GPU: executes it on tensors without memory.

Triton's own binding of arguments decides types, alignment and compile-time values, as on a GPU;
only the compilation and the launch are left out. Imports torch and triton lazily.
"""

# Triton has no types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false

import contextlib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

# Multiprocessors: a division of time into segments depends on them. H100 SXM for 90; otherwise
# A100, B200 and RTX 5090.
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148, 120: 170}


@dataclass(frozen=True, kw_only=True, eq=False)
class Launch:
    """One kernel with everything that decides its machine code."""

    kernel: Any  # the JIT function
    architecture: int
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: Any

    @property
    def name(self) -> str:
        """The kernel's function name."""
        return self.kernel.fn.__name__

    @property
    def configuration(self) -> dict[str, str]:
        """What a person may have tuned: compile-time arguments, warps and stages, as text."""
        names = self.kernel.arg_names
        named = {
            names[path[0]]: str(value) for path, value in self.constants.items() if len(path) == 1
        }
        options = self.options.__dict__
        tuned = ("num_warps", "num_stages", "num_ctas", "maxnreg", "launch_pdl")
        return named | {name: str(options[name]) for name in tuned if name in options}

    @property
    def source(self) -> Any:
        """What Triton compiles; its hash covers every function that the kernel calls."""
        from triton.compiler import ASTSource

        made: Any = ASTSource
        if self.kernel.is_gluon():
            from triton.experimental.gluon._runtime import GluonASTSource

            made = GluonASTSource
        return made(self.kernel, self.signature, self.constants, self.attributes)

    def compile(self) -> Any:
        """Compile for the architecture; returns Triton's compiled kernel."""
        import triton

        return triton.compile(
            self.source, target=_target(self.architecture), options=self.options.__dict__
        )


def record(call: Callable[[Any], object], architecture: int) -> list[Launch]:
    """Return what a call launches on a GPU of an architecture (compute capability times 10).

    `call` gets a maker of tensors, see `kernels.inventory.Draw`. Raises what the call raises.
    """
    launches: list[Launch] = []
    with _recording(architecture, launches) as draw:
        call(draw)
    return launches


class _Draw:
    def __call__(self, *shape: int, dtype: Any = None, grad: bool = False) -> Any:
        import torch

        dtype = dtype or torch.bfloat16
        return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)

    def backward(self, out: Any) -> None:
        import torch

        first: Any = out[0] if isinstance(out, tuple) else out
        torch.autograd.backward([first], [torch.empty_like(first)])


@contextlib.contextmanager
def _recording(architecture: int, launches: list[Launch]) -> Generator[_Draw]:
    """Let tensors say that they are on a GPU of the architecture, and launches be kept."""
    import torch
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    # An index of its own for each architecture: launchers remember what they know of a device.
    device = torch.device("cuda", architecture)
    kind = (architecture // 10, architecture % 10)
    known = SimpleNamespace(
        multi_processor_count=MULTIPROCESSORS[architecture], major=kind[0], minor=kind[1]
    )
    stands_for_driver = SimpleNamespace(
        get_current_device=lambda: architecture,
        get_current_stream=lambda device=None: 0,
        get_current_target=lambda: _target(architecture),
        get_active_torch_device=lambda: device,
    )

    def keep(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        launches.append(_bound(kernel, architecture, arguments, named))

    def nowhere(_: Any) -> Any:
        return contextlib.nullcontext()

    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (torch.cuda, "get_device_properties", lambda _=None: known),
            (torch.cuda, "get_device_capability", lambda _=None: kind),
            (torch.cuda, "current_device", lambda: architecture),
            (torch.cuda, "device_of", nowhere),
            (torch.cuda, "device", nowhere),
            (JITFunction, "run", keep),
            # The same attribute that `driver.active` would set on first use.
            (driver, "_active", stands_for_driver),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        mode = _on_gpu(device)
        run_backward: Any = torch.autograd._engine_run_backward  # pyright: ignore

        def with_mode(*arguments: Any, **named: Any) -> Any:
            with mode:  # which torch leaves to call the backward pass
                return run_backward(*arguments, **named)

        stack.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", with_mode))
        stack.enter_context(mode)
        yield _Draw()


def _bound(kernel: Any, architecture: int, arguments: Any, named: dict[str, Any]) -> Launch:
    """Bind a launch's arguments as Triton's `JITFunction.run` does."""
    named = {**named, "debug": False, "instrumentation_mode": ""}
    _, _, _, backend, binder = kernel.device_caches[architecture]
    bound, specialisation, _ = binder(*arguments, **named)
    packed = kernel._pack_args(backend, named, bound, specialisation, None)
    options, signature, constants, attributes = packed
    return Launch(
        kernel=kernel,
        architecture=architecture,
        signature=signature,
        constants=constants,
        attributes=attributes,
        options=options,
    )


def _on_gpu(device: Any) -> Any:
    """Return a mode in which tensors without memory say that they are on a device."""
    import torch
    from torch.overrides import TorchFunctionMode

    tensor: Any = torch.Tensor
    answers = {tensor.device.__get__: device, tensor.is_cuda.__get__: True}

    class OnGpu(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            if func in answers:
                return answers[func]
            kwargs = dict(kwargs or {})
            if kwargs.get("device") is not None:
                kwargs["device"] = "meta"
            return func(*args, **kwargs)

    return OnGpu()


def _target(architecture: int) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", architecture, 32)
