import sys
from types import SimpleNamespace
from typing import Any

import pytest

from mambench.harness.instruments import launches
from mambench.harness.instruments.launches import CompileTimes, Launch


def test_kernels_are_summed_by_name_the_longest_first() -> None:
    ran = [Launch(name="scan", time_s=3e-6), Launch(name="gate", time_s=4e-6)]
    ran += [Launch(name="scan", time_s=5e-6)]
    assert launches.by_kernel(ran) == [
        {"name": "scan", "count": 2, "time_s": pytest.approx(8e-6), "share": pytest.approx(2 / 3)},
        {"name": "gate", "count": 1, "time_s": pytest.approx(4e-6), "share": pytest.approx(1 / 3)},
    ]


def test_compile_times_count_misses_and_tell_hits() -> None:
    compilation = SimpleNamespace(listener=None)
    triton = SimpleNamespace(knobs=SimpleNamespace(compilation=compilation))
    times = CompileTimes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "triton", triton)
        with times.watching():
            listener: Any = compilation.listener
            for hit in (False, False, True):
                listener(
                    src=None,
                    metadata={"name": "scan"},
                    metadata_group={},
                    times=SimpleNamespace(total=250_000),
                    cache_hit=hit,
                )
    assert compilation.listener is None
    assert times.compiled_s == {"scan": pytest.approx(0.5)}
    assert (times.total_s, times.hits, times.seen) == (pytest.approx(0.5), 1, True)


def test_nothing_compiled_is_not_zero_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    times = CompileTimes()
    with times.watching():
        pass
    assert not times.seen


def test_a_real_compilation_is_heard() -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mambench.kernels.s6 import triton_parts  # any module with jit functions will do

    assert triton_parts
    source = ASTSource(
        fn=_copy(triton), signature={"x": "*fp32", "N": "constexpr"}, constexprs={"N": 64}
    )
    times = CompileTimes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.knobs.compilation, "always_compile", True)
        with times.watching():
            triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert times.seen
    assert times.total_s > 0


def _copy(triton: Any) -> Any:
    import triton.language as tl

    @triton.jit
    def twice(x, N: tl.constexpr):
        offsets = tl.arange(0, N)
        tl.store(x + offsets, 2 * tl.load(x + offsets))

    return twice


class Chain:
    """Hooks as Triton 3.5 and later keep them."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def add(self, hook: Any) -> None:
        self.calls.append(hook)

    def remove(self, hook: Any) -> None:
        self.calls.remove(hook)

    def __call__(self, metadata: Any) -> None:
        for hook in self.calls:
            hook(metadata)


@pytest.mark.parametrize("hooks", [Chain(), None])
def test_launched_kernels_are_counted_and_the_hook_is_taken_off(
    monkeypatch: pytest.MonkeyPatch, hooks: Any
) -> None:
    runtime = SimpleNamespace(launch_enter_hook=hooks)
    triton = SimpleNamespace(knobs=SimpleNamespace(runtime=runtime))
    monkeypatch.setitem(sys.modules, "triton", triton)
    counted: list[dict[int, int]] = []
    monkeypatch.setattr(launches, "_described", lambda launched: counted.append(dict(launched)))

    def execute() -> None:
        for function in (7, 8, 7):
            runtime.launch_enter_hook(SimpleNamespace(get=lambda f=function: {"function": f}))

    launches.triton_kernels(execute, lambda: None)
    assert counted == [{7: 2, 8: 1}]
    assert runtime.launch_enter_hook is hooks
    assert hooks is None or not hooks.calls


def test_constants_are_named_by_the_kernel_s_arguments() -> None:
    source = SimpleNamespace(
        fn=SimpleNamespace(arg_names=["x", "BLOCK", "DTYPE", "PAIR"]),
        constants={(1,): 64, (2,): object, (3, 0): 1},
    )
    found = launches._constants(SimpleNamespace(src=source))
    assert found == {"BLOCK": 64, "DTYPE": "<class 'object'>"}


@pytest.mark.gpu
def test_a_known_kernel_s_launches_and_facts() -> None:
    import torch
    import triton

    twice = _copy(triton)
    x = torch.ones(64, device="cuda")

    def execute() -> None:
        for _ in range(3):
            twice[(1,)](x, N=64, num_warps=2)

    execute()
    (facts,) = launches.triton_kernels(execute, torch.cuda.synchronize) or ()
    assert facts["count"] == 3
    assert facts["constants"] == {"N": 64}
    assert facts["warps"] == 2
    assert facts["registers"] > 0
    assert facts["spills"] == 0
    ran = launches.trace(execute)
    assert [launch.name for launch in ran] == ["twice"] * 3
    assert all(0 < launch.time_s < 1e-3 for launch in ran)
