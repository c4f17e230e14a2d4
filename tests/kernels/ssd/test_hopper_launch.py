"""The launches around Triton's Python give the C launcher what Triton's own way gives it."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

import triton
from triton.backends.nvidia import driver as nvidia

from mambench.kernels.ssd import hopper_launch

META = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "fp4_padded": False}


@pytest.fixture
def driver(monkeypatch):
    """Stand in for the driver: a tensor map is what it would be encoded from."""
    maps = []

    def fill_tma_descriptor(*how):
        maps.append(tuple(tuple(h) if isinstance(h, list) else h for h in how))
        return maps[-1]

    utils = SimpleNamespace(fill_tma_descriptor=fill_tma_descriptor)
    active = SimpleNamespace(
        utils=utils, get_current_stream=lambda device: 70 + device, get_current_device=lambda: 1
    )
    fake = SimpleNamespace(active=active)
    monkeypatch.setattr(triton.runtime, "driver", fake)
    monkeypatch.setattr(hopper_launch, "driver", fake)
    hopper_launch.encoded.cache_clear()
    yield SimpleNamespace(maps=maps)
    hopper_launch.encoded.cache_clear()


class Compiled:
    """A compiled kernel as Triton 3.6 makes it, with a C launcher that records."""

    def __init__(self, launched, metas, signature, *, scratch=0):
        self.metadata = SimpleNamespace(tensordesc_meta=metas)
        self.function, self.packed_metadata = 1234, (4, 1, 999)
        self.run = SimpleNamespace(
            launch=nvidia.wrap_handle_tensordesc(
                lambda *args: launched.append(args), signature, metas
            ),
            launch_cooperative_grid=False, launch_pdl=True,
            global_scratch_size=scratch, profile_scratch_size=0,
        )  # fmt: skip

    def __getitem__(self, grid):
        """Launch as CudaLauncher does."""

        def run(*args):
            stream = triton.runtime.driver.active.get_current_stream(1)
            self.run.launch(
                *grid, stream, self.function, self.run.launch_cooperative_grid,
                self.run.launch_pdl, None, None, self.packed_metadata, None, None, None, *args,
            )  # fmt: skip

        return run


def arguments():
    x = torch.zeros(2, 130, 3, 64, dtype=torch.bfloat16)
    cum = torch.zeros(2, 3, 192)
    args = (hopper_launch.tiles_of(x, 64), None, hopper_launch.rows_of(cum, 64, 1), cum, 5, 64)
    signature = {
        0: "tensordesc<bf16[1, 1, 64, 64]>", 1: "constexpr", 2: "tensordesc<fp32[1, 64]>",
        3: "*fp32", 4: "i32", 5: "constexpr",
    }  # fmt: skip
    metas = [
        META | {"block_size": [1, 1, 64, 64]},
        META | {"elem_size": 4, "elem_type": 7, "swizzle": 0, "block_size": [1, 64]},
    ]
    return args, signature, metas, cum


def test_the_c_launcher_gets_the_same_arguments_as_through_triton(driver):
    args, signature, metas, cum = arguments()
    launched = []
    compiled = Compiled(launched, metas, signature)
    compiled[(4, 3, 2)](*args)
    ready = hopper_launch.Ready.of(compiled)
    assert ready.call is not None
    ready((4, 3, 2), 1, args[:-1], args[-1:])
    through_triton, around = launched
    assert tuple(a.data_ptr() if a is cum else a for a in through_triton) == around
    assert any(a is cum for a in through_triton)


def test_a_tensor_map_is_encoded_once_for_an_address_and_sizes(driver):
    args, signature, metas, _ = arguments()
    ready = hopper_launch.Ready.of(Compiled([], metas, signature))
    for _ in range(3):
        ready((1, 1, 1), 0, args[:-1], args[-1:])
    assert len(driver.maps) == 2
    tall = hopper_launch.tiles_of(torch.zeros(2, 131, 3, 64, dtype=torch.bfloat16), 64)
    tall.base = args[0].base  # the same address, one token more
    ready((1, 1, 1), 0, (tall, *args[1:-1]), args[-1:])
    assert len(driver.maps) == 3
    assert driver.maps[2][0] == driver.maps[0][0]
    assert driver.maps[2] != driver.maps[0]


def test_a_kernel_without_descriptors_is_called_directly(driver):
    launched = []
    ready = hopper_launch.Ready.of(Compiled(launched, None, {0: "*fp32", 1: "i32"}))
    tensor = torch.zeros(4)
    ready((1, 1, 1), 0, (tensor, 3), ())
    assert launched[0][-2:] == (tensor.data_ptr(), 3)
    assert launched[0][3] == 70


def test_hooks_of_a_profiler_and_scratch_memory_take_tritons_way(driver, monkeypatch):
    args, signature, metas, cum = arguments()
    launched = []
    scratch = hopper_launch.Ready.of(Compiled(launched, metas, signature, scratch=128))
    assert scratch.call is None
    ready = hopper_launch.Ready.of(Compiled(launched, metas, signature))
    monkeypatch.setattr(triton.knobs.runtime.launch_enter_hook, "calls", [print])
    for launcher in (scratch, ready):
        launcher((1, 1, 1), 0, args[:-1], args[-1:])
        assert any(a is cum for a in launched.pop())


def test_a_launch_is_ready_for_the_same_kinds_of_arguments_only(driver, monkeypatch):
    monkeypatch.setattr(hopper_launch, "_ready", {})
    launched, compiled = [], []

    class Kernel:
        def __getitem__(self, grid):
            def run(*args, num_warps, launch_pdl, **constants):
                compiled.append((args, constants, launch_pdl))
                return Compiled(launched, None, {})

            return run

    kernel, whole = Kernel(), torch.zeros(64)

    def launch(tensor, size, *, pdl=False, **constants):
        hopper_launch.launch(
            kernel, (1, 1, 1), (tensor, size), constants, (tensor,), device=0, num_warps=4, pdl=pdl
        )

    launch(whole, 3, Q=64)
    launch(whole[16:], 4, Q=64)
    assert (len(compiled), len(launched)) == (1, 1)
    assert launched[0][-3:] == (whole[16:].data_ptr(), 4, 64)
    launch(whole[1:], 3, Q=64)  # another alignment
    launch(whole.double(), 3, Q=64)
    launch(None, 3, Q=64)
    launch(whole, 1 << 31, Q=64)
    launch(whole, 3, Q=32)
    launch(whole, 3, Q=64, pdl=True)
    assert (len(compiled), len(launched)) == (7, 1)
