"""A call that is repeated gives the C launchers what the first one gave them through Triton."""

import ctypes
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

import triton
from triton.backends.nvidia import driver as nvidia

from mambench.kernels import prepared, repeated
from mambench.kernels.ssd import hopper_launch

META = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "fp4_padded": False}
STREAM = 77


@pytest.fixture(autouse=True)
def driver(monkeypatch):
    """Stand in for the driver: a tensor map is what it would be encoded from."""
    maps = []

    def fill_tma_descriptor(*how):
        maps.append(tuple(tuple(h) if isinstance(h, list) else h for h in how))
        return maps[-1]

    utils = SimpleNamespace(fill_tma_descriptor=fill_tma_descriptor)
    active = SimpleNamespace(
        utils=utils, get_current_stream=lambda device: STREAM, get_current_device=lambda: 0
    )
    fake = SimpleNamespace(active=active)
    monkeypatch.setattr(triton.runtime, "driver", fake)
    monkeypatch.setattr(repeated, "driver", fake)
    return SimpleNamespace(maps=maps)


class Kernel:
    """A JIT function and what it compiles to, as Triton 3.6 makes them; launches run `body`."""

    def __init__(self, body, names, *, scratch=0, metas=None, signature=None):
        self.arg_names, self.body = names, body
        self.bound, self.direct = [], []
        self.function, self.packed_metadata = 1234, (4, 1, 999)
        self.metadata = SimpleNamespace(tensordesc_meta=metas)
        launch = self.launch
        if metas:
            launch = nvidia.wrap_handle_tensordesc(launch, signature, metas)
        kind = type("CudaLauncher", (), {"__module__": nvidia.__name__})
        self.run = kind()
        self.run.launch, self.run.launch_cooperative_grid, self.run.launch_pdl = launch, False, True
        self.run.global_scratch_size, self.run.profile_scratch_size = scratch, 0

    def launch(self, *flat):
        """The C launcher."""
        self.direct.append(flat)
        assert flat[3:13] == (STREAM, 1234, False, True, None, None, (4, 1, 999), None, None, None)
        self.body(flat[:3], *flat[13:])

    def __getitem__(self, grid):
        def run(*args, num_warps=None, **constants):
            named = [constants[name] for name in self.arg_names[len(args) :]]
            if num_warps is not None:
                self.bound.append(constants)
            flat = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in (*args, *named)]
            if not self.metadata.tensordesc_meta:
                self.body((*grid, 1, 1)[:3], *flat)
            return self

        return run


def floats(address, count):
    return (ctypes.c_float * count).from_address(address)


def double(grid, source, target, count, factor):
    for i in range(count):
        floats(target, count)[i] = factor * floats(source, count)[i]


def add(grid, left, right, target, count):
    for i in range(count):
        other = 0.0 if right is None else floats(right, count)[i]
        floats(target, count)[i] = floats(left, count)[i] + other


class Operation:
    """factor * x + y in two launches, and the first argument as a second result."""

    def __init__(self, **kernel):
        self.double = Kernel(double, ["source", "target", "count", "FACTOR"], **kernel)
        self.add = Kernel(add, ["left", "right", "target", "count"])
        self.checked = []
        self.scratch = []
        self.calls = prepared.Calls(self.run, self.ready)

    def ready(self, tensors, options):
        self.checked.append(options)
        return tuple(None if t is None else t.contiguous() for t in tensors)

    def run(self, recording, tensors, options):
        x, y = tensors
        unused = recording.scratch((3,), x.dtype, x.device)
        middle = recording.scratch(x.shape, x.dtype, x.device)
        out = recording.output(x.shape, x.dtype, x.device)
        self.scratch = [unused, middle]
        factor = {"FACTOR": options[0]}
        recording.launch(self.double, (2,), (x, middle, x.numel()), factor, num_warps=4)
        recording.launch(self.add, (1, 1, 1), (middle, y, out, x.numel()), {}, num_warps=4)
        return out, x

    @property
    def launches(self):
        return len(self.double.bound), len(self.double.direct)


def right(operation, x, y, factor=2.0):
    out, same = operation.calls((x, y), (factor,))
    want = factor * x + (0.0 if y is None else y)
    return torch.equal(out, want) and same.data_ptr() == x.data_ptr()


def test_the_second_call_allocates_and_launches_only():
    operation = Operation()
    tensors = [torch.randn(2, 5) for _ in range(6)]
    outs = []
    for x, y in zip(tensors[:3], tensors[3:], strict=True):
        assert right(operation, x, y)
        outs.append(operation.calls((x, y), (2.0,))[0])
    assert operation.launches == (1, 5)
    assert len(operation.checked) == 1
    assert operation.double.direct[0][:3] == (2, 1, 1)
    assert len({out.data_ptr() for out in outs}) == 3


def test_what_launches_depend_on_is_told_apart():
    operation = Operation()
    x, y = torch.randn(64), torch.randn(64)
    calls = [
        (x, y, 2.0),
        (x, y, 3.0),
        (x, None, 2.0),
        (x[:32], y[:32], 2.0),
        (x[1:33], y[:32], 2.0),  # another alignment
        (x.view(8, 8), y.view(8, 8), 2.0),
        (x.view(4, 16), y.view(4, 16), 2.0),
    ]
    for _ in range(2):
        for call in calls:
            assert right(operation, *call)
    assert operation.launches == (7, 7)


def test_one_tensor_for_two_arguments_is_not_taken_for_either():
    operation = Operation()
    x, y = torch.randn(16), torch.randn(16)
    assert right(operation, x, x)
    assert right(operation, x, y)
    assert operation.launches == (2, 0)
    assert right(operation, y, x)
    assert right(operation, x, x)
    assert operation.launches == (2, 2)


def test_copies_are_made_on_every_call():
    operation = Operation()
    for _ in range(3):
        x, y = torch.randn(4, 6).t(), torch.randn(6, 4)
        out, _ = operation.calls((x, y), (2.0,))
        assert torch.equal(out, 2.0 * x + y)
    assert operation.launches == (1, 2)


def test_what_stays_as_it_is_after_a_copy_is_launched_all_the_same():
    operation = Operation()
    operation.ready = lambda tensors, options: tuple(t.clone() for t in tensors)
    operation.calls = prepared.Calls(operation.run, operation.ready)
    for _ in range(2):
        x, y = torch.randn(6), torch.randn(6)
        out, same = operation.calls((x, y), (2.0,))
        assert torch.equal(out, 2.0 * x + y)
        assert torch.equal(same, x)


def test_results_are_of_the_call_and_scratch_memory_is_apart():
    operation = Operation()
    x, y = torch.randn(100), torch.randn(100)
    operation.calls((x, y), (2.0,))
    other = x.clone()
    assert operation.calls((other, y), (2.0,))[1] is other
    (unused, middle), call = operation.scratch, operation.double.direct[-1]
    assert unused.numel() * 4 <= 256  # the first piece; the second follows at the next multiple
    assert call[13] == other.data_ptr()
    assert call[14] % 16 == 0
    assert len({call[13], call[14], middle.data_ptr()}) == 3


class InParts(Operation):
    """The same, two columns at a time, in the memory of the two before."""

    def run(self, recording, tensors, options):
        x, y = tensors
        out = recording.output(x.shape, x.dtype, x.device)
        held = recording.scratch((1, 2), torch.float64, x.device)
        self.scratch = []
        for begin in range(0, x.shape[1], 2):
            recording.spare(held)
            middle = recording.scratch((1, 2), x.dtype, x.device)
            self.scratch.append(middle.data_ptr())
            a, b, to = (recording.part(t, begin, 2) for t in (x, y, out))
            recording.launch(self.double, (2,), (a, middle, 2), {"FACTOR": options[0]}, num_warps=4)
            recording.launch(self.add, (1, 1, 1), (middle, b, to, 2), {}, num_warps=4)
        return out, x


def test_parts_of_tensors_follow_them_and_share_scratch_memory():
    operation = InParts()
    for _ in range(3):
        assert right(operation, torch.randn(1, 8), torch.randn(1, 8))
    assert operation.launches == (4, 8)
    assert len(set(operation.scratch)) == 1
    repeated = operation.double.direct[-4:]
    assert len({call[14] for call in repeated}) == 1
    assert [call[13] - repeated[0][13] for call in repeated] == [0, 8, 16, 24]


def test_what_cannot_be_repeated_is_checked_and_launched_as_written_every_time():
    class Refused(Operation):
        def run(self, recording, tensors, options):
            recording.refuse()
            return super().run(recording, tensors, options)

    class Unknown(Operation):
        def run(self, recording, tensors, options):
            return super().run(recording, (tensors[0], tensors[1].clone()), options)

    class Returned(Operation):
        def run(self, recording, tensors, options):
            return super().run(recording, tensors, options)[0].clone(), tensors[0]

    for operation in (Refused(), Unknown(), Returned()):
        for _ in range(3):
            assert right(operation, torch.randn(8), torch.randn(8))
        assert len(operation.checked) == 3


def test_a_profiler_s_hooks_see_every_launch(monkeypatch):
    operation = Operation()
    assert right(operation, torch.randn(8), torch.randn(8))
    monkeypatch.setattr(triton.knobs.runtime.launch_enter_hook, "calls", [print])
    assert right(operation, torch.randn(8), torch.randn(8))
    assert operation.launches == (2, 0)


@pytest.mark.parametrize("why", ["another version", "scratch memory"])
def test_another_launcher_is_called_as_triton_calls_it(why, monkeypatch):
    operation = Operation(scratch=128 if why == "scratch memory" else 0)
    if why == "another version":
        monkeypatch.setattr(triton, "__version__", "3.5.1")
    for _ in range(3):
        assert right(operation, torch.randn(8), torch.randn(8))
    assert operation.launches == (1, 0)


def test_errors_are_raised_every_time_and_nothing_is_remembered():
    def ready(tensors, options):
        raise ValueError("expected something else")

    calls = prepared.Calls(lambda *_: (), ready)
    for _ in range(2):
        with pytest.raises(ValueError, match="something else"):
            calls((torch.zeros(3),), ())


def described(x, recording):
    """Launch a kernel on descriptors of x and of scratch memory."""
    cum = recording.scratch((2, 3, 192), torch.float32, x.device)
    signature = {
        0: "tensordesc<bf16[1, 1, 64, 64]>", 1: "constexpr", 2: "tensordesc<fp32[1, 64]>",
        3: "*fp32", 4: "i32", 5: "constexpr",
    }  # fmt: skip
    metas = [
        META | {"block_size": [1, 1, 64, 64]},
        META | {"elem_size": 4, "elem_type": 7, "swizzle": 0, "block_size": [1, 64]},
    ]
    names = ["x", "z", "cum_desc", "cum", "n", "Q"]
    kernel = Kernel(lambda *_: None, names, metas=metas, signature=signature)
    args = (hopper_launch.tiles_of(x, 64), None, hopper_launch.rows_of(cum, 64, 1), cum, 5)
    recording.launch(kernel, (4, 3, 2), args, {"Q": 64}, num_warps=4)
    return kernel, args, cum


def test_the_c_launcher_gets_the_same_arguments_as_through_triton(driver):
    x = torch.zeros(2, 130, 3, 64, dtype=torch.bfloat16)
    recording = prepared.Recording((x,))
    kernel, args, cum = described(x, recording)
    before = (4, 3, 2, STREAM, 1234, False, True, None, None, (4, 1, 999), None, None, None)
    kernel.run.launch(*before, *args, 64)
    call = recording.prepared(())
    assert call is not None
    call((x,), [x.data_ptr()])
    through_triton, around = kernel.direct
    there = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in through_triton]
    at = [i for i, a in enumerate(through_triton) if a is cum]
    assert len(at) == 1
    (first, *rest), (_, *others) = driver.maps[1::2]
    assert first == cum.data_ptr()
    assert rest != others or first != others[0]
    differ = [i for i, (a, b) in enumerate(zip(there, around, strict=True)) if a != b]
    scratch = around[at[0]]
    # All but where scratch memory is, and the map of it, which names that address alone.
    assert len(differ) == 2
    assert at[0] in differ
    encoded = next(around[i] for i in differ if i != at[0])
    assert encoded == (scratch, *driver.maps[1][1:])


def test_a_tensor_map_is_encoded_once_for_an_address(driver):
    x = torch.zeros(2, 130, 3, 64, dtype=torch.bfloat16)
    recording = prepared.Recording((x,))
    described(x, recording)
    call = recording.prepared(())
    assert call is not None
    for _ in range(3):
        call((x,), [x.data_ptr()])
    addresses = [made[0] for made in driver.maps]
    assert addresses.count(x.data_ptr()) == 1
    other = x.clone()
    call((other,), [other.data_ptr()])
    assert driver.maps[-2][0] == other.data_ptr() or driver.maps[-1][0] == other.data_ptr()


def test_threads_call_at_once():
    """As autograd's thread does beside the caller's; none has another's tensors."""
    operation, start, wrong = Operation(), threading.Barrier(4), []

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        start.wait()
        for turn in range(40):
            x, y = (torch.randn(2 + turn % 3, generator=generator) for _ in range(2))
            if not right(operation, x, y, factor=float(seed % 2)):
                wrong.append((seed, turn))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(operation.calls._known) == 6
    assert sum(operation.launches) == 160


class InPhases(Operation):
    """The same, with the left argument given away and memory of one launch for the next."""

    def run(self, recording, tensors, options):
        early = recording.scratch((70,), torch.float32, tensors[1].device)
        middle = early[64:].view(tensors[1].shape)
        kept = recording.scratch((300,), torch.float32, tensors[1].device)
        factor = {"FACTOR": options[0]}
        recording.launch(self.double, (2,), (tensors[0], middle, 6), factor, num_warps=4)
        recording.free(tensors[0])
        outs = recording.output((3, 2, 3), torch.float32, tensors[1].device)
        recording.launch(self.add, (1, 1, 1), (middle, tensors[1], outs[1], 6), {}, num_warps=4)
        recording.free(early)
        del early, middle
        late = recording.scratch((6,), torch.float32, tensors[1].device)
        recording.launch(self.add, (1, 1, 1), (outs[1], None, late, 6), {}, num_warps=4)
        recording.launch(self.add, (1, 1, 1), (late, None, outs[2], 6), {}, num_warps=4)
        self.kept = kept
        return outs[1], outs[2].t(), outs[2]


def test_what_is_freed_is_let_go_of_and_its_memory_used_again():
    operation = InPhases()
    for _ in range(4):
        x, y = torch.randn(2, 3), torch.randn(2, 3)
        want, gone = 2.0 * x + y, weakref.ref(x)
        tensors = [x, y]
        del x
        one, turned, two = operation.calls(tensors, (2.0,))
        assert torch.equal(one, want)
        assert torch.equal(two, want)
        assert torch.equal(turned, want.t())
        assert gone() is None
        assert tensors[0] is None
        assert tensors[1] is y
    assert operation.launches == (1, 3)
    (prepared_call,) = operation.calls._known.values()
    first, second, third = prepared_call.phases
    assert [len(each.blocks) for each in (first, second, third)] == [2, 0, 1]
    assert (first.given, first.freed, second.freed, third.freed) == ((0,), (), (0,), ())
    assert [offset for _, offset in first.parts] == [64 * 4]


def test_a_copy_of_what_is_given_away_is_what_is_freed():
    operation = InPhases()
    for _ in range(3):
        x, y = torch.randn(3, 2), torch.randn(2, 3)
        want, tensors = 2.0 * x.t() + y, [x.t(), y]
        assert torch.equal(operation.calls(tensors, (2.0,))[0], want)
        assert tensors[0] is None
    assert operation.launches == (1, 2)


def test_a_call_that_is_not_repeated_frees_all_the_same():
    class Refused(InPhases):
        def run(self, recording, tensors, options):
            recording.refuse()
            return super().run(recording, tensors, options)

    operation = Refused()
    for _ in range(2):
        x, y = torch.randn(2, 3), torch.randn(2, 3)
        want, tensors = 2.0 * x + y, [x, y]
        assert torch.equal(operation.calls(tensors, (2.0,))[2], want)
        assert tensors[0] is None
    assert operation.launches == (2, 0)


@pytest.mark.parametrize("what", ["an output", "a part", "nothing that is known"])
def test_freeing_anything_else_is_not_repeated(what):
    class Other(Operation):
        def run(self, recording, tensors, options):
            out, x = super().run(recording, tensors, options)
            scratch = recording.scratch((4, 4), torch.float32, x.device)
            others = {"an output": out, "a part": scratch[1:]}
            recording.free(others.get(what, torch.zeros(3)))
            return out, x

    operation = Other()
    for _ in range(2):
        assert right(operation, torch.randn(8), torch.randn(8))
    assert operation.launches == (2, 0)


def test_a_part_that_is_freed_is_of_no_known_origin():
    class Late(InPhases):
        def run(self, recording, tensors, options):
            scratch = recording.scratch((6,), torch.float32, tensors[1].device)
            recording.free(scratch)
            factor = {"FACTOR": options[0]}
            recording.launch(self.double, (2,), (tensors[0], scratch, 6), factor, num_warps=4)
            out = recording.output((2, 3), torch.float32, tensors[1].device)
            recording.launch(self.add, (1, 1, 1), (scratch, None, out, 6), {}, num_warps=4)
            return (out,)

    operation = Late()
    for _ in range(2):
        x = torch.randn(2, 3)
        assert torch.equal(operation.calls((x, torch.randn(2, 3)), (2.0,))[0], 2.0 * x)
    assert operation.launches == (2, 0)


def test_a_tensor_without_elements_is_no_address():
    class Empty(Operation):
        def run(self, recording, tensors, options):
            out, x = super().run(recording, tensors, options)
            nothing = recording.scratch((4,), torch.float32, x.device)[:0]
            recording.launch(self.empty, (1,), (nothing, out, 0), {"FACTOR": 1.0}, num_warps=4)
            return out, x

    operation = Empty()
    operation.empty = Kernel(lambda *_: None, ["source", "target", "count", "FACTOR"])
    for _ in range(3):
        assert right(operation, torch.randn(8), torch.randn(8))
    assert [call[13] for call in operation.empty.direct] == [0, 0]


def test_gradients_are_in_their_tensors_dtypes():
    wide, narrow = torch.ones(3), torch.ones(3, dtype=torch.bfloat16)
    same, cast, absent, unasked = prepared.as_given(
        (wide, wide, None, wide), (wide, narrow, wide, None)
    )
    assert same is wide
    assert cast.dtype == torch.bfloat16
    assert absent is None
    assert unasked is None
