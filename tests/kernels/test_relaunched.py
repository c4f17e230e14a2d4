"""A kernel launched again gives the C launcher what Triton gave it, and knows what kinds are."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

import triton
from triton.backends.nvidia import driver as nvidia

from mambench.kernels import prepared, relaunched
from mambench.kernels.ssd import hopper_launch

META = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "fp4_padded": False, "block_size": [64, 64]}
STREAM = 77


@pytest.fixture(autouse=True)
def driver(monkeypatch):
    """Stand in for the driver: a tensor map is what it would be encoded from."""
    maps = []

    def fill_tma_descriptor(*how):
        maps.append(tuple(tuple(h) if isinstance(h, list) else h for h in how))
        return maps[-1]

    utils = SimpleNamespace(fill_tma_descriptor=fill_tma_descriptor)
    active = SimpleNamespace(utils=utils, get_current_stream=lambda device: STREAM)
    fake = SimpleNamespace(active=active)
    for module in (triton.runtime, prepared, relaunched):
        monkeypatch.setattr(module, "driver", fake)
    relaunched._encoded.cache_clear()
    return SimpleNamespace(maps=maps)


class Kernel:
    """A JIT function and what it compiles to; `seen` is what Triton's launcher was given."""

    def __init__(self, names, *, scratch=0, metas=None, signature=None):
        self.arg_names, self.bound, self.seen = names, 0, []
        self.params = [SimpleNamespace(is_constexpr=name.isupper()) for name in names]
        self.function, self.packed_metadata = 1234, (4, 1, 999)
        self.metadata = SimpleNamespace(tensordesc_meta=metas)
        launch = self._launch
        if metas:
            launch = nvidia.wrap_handle_tensordesc(launch, signature, metas)
        self.run = type("CudaLauncher", (), {"__module__": nvidia.__name__})()
        self.run.launch, self.run.launch_cooperative_grid, self.run.launch_pdl = launch, True, False
        self.run.global_scratch_size, self.run.profile_scratch_size = scratch, 0

    def _launch(self, *flat):
        self.seen.append(flat)

    def __getitem__(self, grid):
        def run(*args, num_warps=4, **constants):
            self.bound += 1
            named = [constants[name] for name in self.arg_names[len(args) :]]
            before = (*grid, 1, 1)[:3], STREAM, 1234, True, False, None, None, (4, 1, 999)
            flat = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in (*args, *named)]
            self.run.launch(*before[0], *before[1:], None, None, None, *flat)
            return self

        return run


def test_the_second_launch_of_a_kind_gives_the_same_past_triton():
    kernel = Kernel(["x", "y", "count", "scale", "SIZE"])
    again = relaunched.Relaunched(kernel)
    x = torch.zeros(8)
    for _ in range(3):
        again[(2, 3)](x, None, 24, 0.5, SIZE=16, num_warps=4)
    assert kernel.bound == 1
    assert len(kernel.seen) == 3
    assert len(set(kernel.seen)) == 1
    assert kernel.seen[0][:3] == (2, 3, 1)
    assert kernel.seen[0][-5:] == (x.data_ptr(), None, 24, 0.5, 16)


def test_values_that_triton_does_not_compile_for_are_those_of_the_call():
    kernel = Kernel(["x", "count", "scale", "SIZE"])
    again = relaunched.Relaunched(kernel)
    x, other = torch.zeros(8), torch.zeros(8)
    again[(1,)](x, 24, 0.5, SIZE=16)
    again[(9,)](other, 25, 0.25, SIZE=16)
    assert kernel.bound == 1
    assert kernel.seen[1][0] == 9
    assert kernel.seen[1][-4:] == (other.data_ptr(), 25, 0.25, 16)


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(9)[1:]},
        {"x": torch.zeros(8, dtype=torch.float16)},
        {"x": None},
        {"count": 1},
        {"count": 32},
        {"count": 3 << 31 | 1},
        {"flag": False},
        {"SIZE": 32},
        {"num_warps": 8},
    ],
    ids=str,
)
def test_what_triton_compiles_for_is_told_apart(change):
    kernel = Kernel(["x", "count", "flag", "SIZE"])
    again = relaunched.Relaunched(kernel)
    usual = {"x": torch.zeros(8), "count": 25, "flag": True, "SIZE": 16, "num_warps": 4}

    def launch(x, count, flag, **constants):
        again[(1,)](x, count, flag, **constants)

    launch(**usual)
    launch(**usual | change)
    assert kernel.bound == 2


def test_constants_that_are_given_by_position_are_told_apart():
    kernel = Kernel(["x", "SIZE", "LEFT"])
    again = relaunched.Relaunched(kernel)
    x = torch.zeros(8)
    for size, left in ((32, True), (64, True), (32, False), (32, 0), (64, True)):
        again[(1,)](x, size, left)
    assert kernel.bound == 4
    assert [flat[-2:] for flat in kernel.seen][::4] == [(32, True), (64, True)]


def test_a_profiler_s_hooks_see_every_launch(monkeypatch):
    kernel = Kernel(["x"])
    again = relaunched.Relaunched(kernel)
    x = torch.zeros(8)
    again[(1,)](x)
    monkeypatch.setattr(relaunched, "some_hook", lambda: True)
    again[(1,)](x)
    assert kernel.bound == 2


@pytest.mark.parametrize("why", ["scratch", "version"])
def test_what_is_not_known_goes_through_triton_every_time(why, monkeypatch):
    kernel = Kernel(["x"], scratch=128 if why == "scratch" else 0)
    if why == "version":
        monkeypatch.setattr(triton, "__version__", "3.9.0")
    again = relaunched.Relaunched(kernel)
    for _ in range(3):
        again[(1,)](torch.zeros(8))
    assert kernel.bound == 3


def test_what_is_no_jit_function_is_launched_as_it_is():
    @triton.jit
    def kernel(x):
        pass

    kernels = {(1,): lambda x: x}
    assert relaunched.relaunched(kernels) is kernels
    found = relaunched.relaunched(kernel)
    if isinstance(kernel, triton.JITFunction):  # else in the interpreter
        assert isinstance(found, relaunched.Relaunched)
        assert relaunched.relaunched(kernel) is found


def test_descriptors_are_given_as_through_triton(driver):
    layout = "tensordesc<bf16[1, 1, 64, 64],NVMMASharedLayout()>"
    kernel = Kernel(["rows", "count"], metas=[META], signature={"rows": layout, "count": "i32"})
    again = relaunched.Relaunched(kernel)
    tensors = [torch.zeros(1, 128, 2, 64, dtype=torch.bfloat16) for _ in range(2)]
    for tensor in tensors:
        for _ in range(2):
            again[(4,)](hopper_launch.tiles_of(tensor, 64), 7)
    through, *past = kernel.seen
    assert kernel.bound == 1
    assert past[0] == through
    assert past[1] == past[2]
    assert past[2][13][0] == tensors[1].data_ptr()
    assert len(driver.maps) == 3  # Triton's, and one for an address
