"""A repeated backward launches what the first one did, in memory that is as free as it was then.

On the CPU nothing is computed: kernels stand in that note what they are given. A call of other
tensors is repeated, and run as written; every pointer of the one must be where the other has it.
"""

import importlib
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton.experimental.gluon")

import triton
from triton.backends.nvidia import driver as nvidia

from mambench.kernels import prepared, repeated

PROCESSORS = 132
STREAM = 77
ROUNDING = 1 << 15  # bytes: pieces of scratch memory begin at multiples
META = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "fp4_padded": False, "block_size": [64, 64]}


@dataclass
class Launch:
    """A kernel, its grid and arguments; a tensor map is the address that it is made of."""

    name: str
    grid: tuple
    arguments: list
    memory: dict  # what was alive, by address: bytes and the number of the allocation


class Memory(TorchDispatchMode):
    """Knows all memory that is alive, in the order of its allocation.

    No place is given twice, or a pointer to what was freed might be one to what came after it.
    """

    def __init__(self):
        super().__init__()
        self._alive, self._made = {}, 0
        self._given, self._kept_back = [], []
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        while "empty" in str(func) and self._given_before(result.untyped_storage()):
            self._kept_back.append(result)
            result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                known = torch.multiprocessing.reductions.StorageWeakRef(storage)
                if known not in self._alive and storage.nbytes():
                    self._alive[known] = (storage.data_ptr(), storage.nbytes(), self._made)
                    self._given.append((storage.data_ptr(), storage.nbytes()))
                    self._made += 1
        self.peak = max(self.peak, sum(size for size, _ in self.now().values()))
        return result

    def _given_before(self, storage):
        begin, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        return any(begin < other + size and other < end for other, size in self._given)

    def now(self):
        """Return bytes and number of what is alive, by address."""
        alive = {ref: what for ref, what in self._alive.items() if not ref.expired()}
        self._alive = alive
        return {address: (size, number) for address, size, number in alive.values()}


class Stand:
    """Stands for a JIT function and for what it compiles to."""

    def __init__(self, kernel, machine):
        self._kernel, self._machine = kernel, machine
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid):
        def run(*given, num_warps=4, maxnreg=None, launch_pdl=False, **constants):
            constants.pop("launch_cooperative_grid", None)
            others = [constants[name] for name in self.arg_names[len(given) :]]
            assert set(constants) == set(self.arg_names[len(given) :])
            flat, descriptors = [], 0
            for value in (*given, *others):
                if isinstance(value, torch.Tensor):
                    flat.append(value.data_ptr() if value.numel() else 0)
                elif hasattr(value, "block_shape"):
                    descriptors += 1
                    flat += [("map", value.base.data_ptr()), *value.shape, *value.strides]
                else:
                    flat.append(value)
            grid3 = (*grid, 1, 1)[:3]
            self._machine.launched(self._kernel.__name__, grid3, flat)
            return self._compiled(descriptors)

        return run

    def _compiled(self, descriptors):
        def launch(*flat):
            assert flat[3] == STREAM
            self._machine.launched(self._kernel.__name__, flat[:3], list(flat[13:]))

        metas = [META] * descriptors
        if metas:
            signature = dict.fromkeys(range(descriptors), "tensordesc<bf16[64]>")
            launch = nvidia.wrap_handle_tensordesc(launch, signature, metas)
        run = type("CudaLauncher", (), {"__module__": nvidia.__name__})()
        run.launch, run.launch_cooperative_grid, run.launch_pdl = launch, False, False
        run.global_scratch_size = run.profile_scratch_size = 0
        metadata = SimpleNamespace(tensordesc_meta=metas)
        return SimpleNamespace(run=run, metadata=metadata, function=1, packed_metadata=(4, 1, 0))


LAUNCHERS = (
    "s6.hopper_scan", "s6.hopper_backward", "s6.hopper_wide", "ssd.triton_ssd", "ssd.triton_parts",
    "ssd.triton_ssd_backward", "ssd.triton_whole", "ssd.triton_sums", "ssd.hopper_ssd",
    "ssd.hopper_fused", "ssd.hopper_walk", "ssd.hopper_grad",
)  # fmt: skip


def module(name):
    return importlib.import_module(f"mambench.kernels.{name}")


def calls():
    """Return everything that remembers calls, by operation."""
    backward = module("s6.hopper_backward")._calls
    return {
        "s6 hopper": (module("s6.hopper_scan")._calls, backward),
        "ssd hopper": (module("ssd.hopper_op")._calls, module("ssd.hopper_op")._gradients._calls),
        "ssd triton": (
            module("ssd.triton_ssd")._calls, module("ssd.triton_ssd")._gradients._calls,
        ),
    }  # fmt: skip


@pytest.fixture
def machine(monkeypatch):
    """Plan for an H100; note what is launched, and run nothing."""
    found = SimpleNamespace(launches=[], memory=None)

    def launched(name, grid, arguments):
        found.launches.append(Launch(name, tuple(grid), arguments, found.memory.now()))

    def fill_tma_descriptor(address, *how):
        return ("map", address)

    found.launched = launched
    active = SimpleNamespace(
        utils=SimpleNamespace(fill_tma_descriptor=fill_tma_descriptor),
        get_current_stream=lambda device: STREAM,
    )
    for each in (triton.runtime, repeated):
        monkeypatch.setattr(each, "driver", SimpleNamespace(active=active))
    for launcher in map(module, LAUNCHERS):
        for name, kernel in list(vars(launcher).items()):
            if isinstance(kernel, triton.JITFunction):
                monkeypatch.setattr(launcher, name, Stand(kernel, found))
    for name in ("s6.hopper_backward", "ssd.hopper_grad", "ssd.hopper_ssd", "ssd.triton_launch"):
        monkeypatch.setattr(module(name), "multiprocessors", lambda device: PROCESSORS)
    monkeypatch.setattr(module("s6.hopper_scan"), "_multiprocessors", lambda device: PROCESSORS)
    monkeypatch.setattr(module("ssd.triton_ssd_backward"), "multiprocessors", lambda _: PROCESSORS)
    monkeypatch.setattr(module("ssd.triton_launch"), "has_wgmma", lambda device: True)
    forget()
    yield found
    forget()


def forget():
    module("ssd.hopper_ssd")._planned.cache_clear()
    for each in calls().values():
        for known in each:
            known.clear()


BF16, FP32 = torch.bfloat16, torch.float32


def empty(*shape, dtype=BF16):
    """Return memory that nothing touches, so that it may be large."""
    return torch.empty(shape, dtype=dtype)


def s6(*, batch=1, seqlen=2048, d_inner=2048, d_state=16, ngroups=1, gated=False, last=False):
    rows, shared = (batch, d_inner, seqlen), (batch, ngroups, d_state, seqlen)
    tensors = {
        "u": empty(*rows), "delta": empty(*rows), "A": empty(d_inner, d_state, dtype=FP32),
        "B": empty(*shared), "C": empty(*shared), "D": empty(d_inner, dtype=FP32),
        "z": empty(*rows) if gated else None, "delta_bias": empty(d_inner, dtype=FP32),
    }  # fmt: skip
    return tensors, {"delta_softplus": True, "return_last_state": last}


def ssd(
    *, batch=1, seqlen=2048, nheads=32, headdim=64, d_state=128, ngroups=1, gated=False,
    start=False, last=False, D=1, dtype=BF16, segments=None,
):  # fmt: skip
    tokens, shared = (batch, seqlen, nheads), (batch, seqlen, ngroups, d_state)
    skip = {0: None, 1: (nheads,), 2: (nheads, headdim)}[D]
    states = (batch, nheads, headdim, d_state)
    tensors = {
        "x": empty(*tokens, headdim, dtype=dtype), "dt": empty(*tokens),
        "A": empty(nheads, dtype=FP32), "B": empty(*shared, dtype=dtype),
        "C": empty(*shared, dtype=dtype), "D": skip and empty(*skip, dtype=FP32),
        "z": empty(*tokens, headdim, dtype=dtype) if gated else None,
        "dt_bias": empty(nheads, dtype=FP32),
        "initial_states": empty(*states, dtype=FP32) if start else None,
    }  # fmt: skip
    options = {"dt_softplus": True, "chunk_size": 64, "segments": segments}
    return tensors, options | {"return_final_states": last}


CASES = {
    "s6, sums in the gradients": ("s6 hopper", s6, {}),
    "s6, a final state's gradient, gated": ("s6 hopper", s6, {"last": True, "gated": True}),
    "s6, one segment": ("s6 hopper", s6, {"batch": 8, "seqlen": 512}),
    "s6, scratch memory": ("s6 hopper", s6, {"seqlen": 1000, "d_inner": 40, "last": True}),
    "s6, groups": ("s6 hopper", s6, {"ngroups": 2, "batch": 2, "seqlen": 4096}),
    "s6, 64 states": ("s6 hopper", s6, {"d_state": 64}),
    "s6, 128 states, short": ("s6 hopper", s6, {"d_state": 128, "seqlen": 200, "d_inner": 256}),
    "s6, 128 states, wide": ("s6 hopper", s6, {"d_state": 128, "d_inner": 5120, "last": True}),
    "s6, 200 states": ("s6 hopper", s6, {"d_state": 200, "seqlen": 777, "d_inner": 96}),
    "ssd": ("ssd hopper", ssd, {}),
    "ssd, one segment": ("ssd hopper", ssd, {"segments": 1, "last": True}),
    "ssd, one segment with a start": (
        "ssd hopper", ssd, {"segments": 1, "start": True, "last": True},
    ),
    "ssd, short": ("ssd hopper", ssd, {"seqlen": 512}),
    "ssd, a start and channels of D": (
        "ssd hopper", ssd, {"start": True, "last": True, "D": 2, "ngroups": 2},
    ),
    "ssd, gated": ("ssd hopper", ssd, {"gated": True, "D": 0, "batch": 2}),
    "portable ssd": ("ssd triton", ssd, {"segments": 4}),
    "portable ssd, gated": ("ssd triton", ssd, {"gated": True, "start": True, "seqlen": 700}),
    "portable ssd, fp32": ("ssd triton", ssd, {"dtype": FP32, "D": 2, "last": True}),
}  # fmt: skip


def operation(name):
    function = {
        "s6 hopper": ("s6.hopper_op", "selective_scan"), "ssd hopper": ("ssd.hopper_op", "ssd"),
        "ssd triton": ("ssd.triton_ssd", "ssd"),
    }[name]  # fmt: skip
    return getattr(module(function[0]), function[1])


def step(machine, name, make, sizes, *, retain=False):
    """Run a step; returns the addresses of its tensors by number, launches, gradients, the peak."""
    tensors, options = make(**sizes)
    first = next(iter(tensors.values()))
    leaves = [t.requires_grad_() for t in tensors.values() if t is not None]
    grads = [torch.empty_like(first)]
    machine.launches.clear()
    with Memory() as machine.memory:
        outs = operation(name)(**tensors, **options)
        outs = outs if isinstance(outs, tuple) else (outs,)
        grads += [torch.empty_like(t) for t in outs[1:]]
        found = torch.autograd.grad(outs, leaves, grads, retain_graph=retain)
    given = [*leaves, *grads[:1]]
    return SimpleNamespace(
        given={t.data_ptr(): i for i, t in enumerate(given)}, launches=list(machine.launches),
        found=found, leaves=leaves, held=(tensors, grads, outs), peak=machine.memory.peak,
    )  # fmt: skip


def number_of(address, launch):
    """Return the number of the allocation that holds an address, and where in it."""
    for begin, (size, number) in launch.memory.items():
        if begin <= address < begin + size:
            return number, address - begin
    return None


def assert_the_same(written, again):
    """Hold a repeated step's launches to those of the step as it is written."""
    assert [(one.name, one.grid) for one in written.launches] == [
        (one.name, one.grid) for one in again.launches
    ]
    bases = {}  # of an allocation of the step as written: its address in the repeated one
    last = {}  # ... and the launch that used it last
    for index, (one, other) in enumerate(zip(written.launches, again.launches, strict=True)):
        assert len(one.arguments) == len(other.arguments)
        for a, b in zip(one.arguments, other.arguments, strict=True):
            if isinstance(a, tuple):
                assert isinstance(b, tuple)
                a, b = a[1], b[1]
            if not isinstance(a, int) or isinstance(a, bool) or abs(a) < 1 << 32:
                assert a == b
                assert type(a) is type(b)
                continue
            if a in written.given:
                assert again.given[b] == written.given[a]
                continue
            place = number_of(a, one)
            assert place is not None, "a pointer to nothing that is alive"
            assert number_of(b, other) is not None, "a pointer to memory that was freed"
            number, offset = place
            size = next(size for size, n in one.memory.values() if n == number)
            assert bases.setdefault((number, size), b - offset) == b - offset
            last.setdefault((number, size), [index, index])[1] = index
    for one, (begin, end) in last.items():
        for other, (from_, to) in last.items():
            if one < other and begin <= to and from_ <= end:
                a, b = bases[one], bases[other]
                assert a + one[1] <= b or b + other[1] <= a, "two tensors in one place"


@pytest.mark.parametrize("case", CASES)
def test_a_repeated_step_is_that_which_is_written(case, machine):
    name, make, sizes = CASES[case]
    first = step(machine, name, make, sizes)
    known = [len(each._known) for each in calls()[name]]
    assert known == [1, 1]
    again = step(machine, name, make, sizes)
    assert [len(each._known) for each in calls()[name]] == known
    forget()
    written = step(machine, name, make, sizes)
    assert_the_same(written, again)
    assert_the_same(first, again)
    for step_ in (first, again, written):
        for gradient, leaf in zip(step_.found, step_.leaves, strict=True):
            assert (gradient.shape, gradient.dtype) == (leaf.shape, leaf.dtype)
            assert gradient.is_contiguous()
    assert again.peak <= written.peak + ROUNDING


def step_faultily(machine, case, plant):
    """Return the case's step as written, and repeated after a fault was planted."""
    name, make, sizes = CASES[case]
    written = step(machine, name, make, sizes)
    plant()
    forget()
    step(machine, name, make, sizes)
    assert [len(each._known) for each in calls()[name]] == [1, 1]
    return written, step(machine, name, make, sizes)


def moved_launch(events):
    """Divide a call so that a phase's last launch comes after what the phase frees."""
    phases = PLANNED(events)
    if len(phases) > 1:
        phases[1].steps.insert(0, phases[0].steps.pop())
    return phases


def without_offset(recording, tensor):
    place = PLACE(recording, tensor)
    return place if place is None else place.whole


PLANNED, PLACE, BYTES = repeated._planned, prepared.Recording._place, repeated._bytes
FAULTS = {
    "freed too early": ("ssd", repeated, "_planned", moved_launch),
    "pieces in one place": ("ssd", repeated, "_bytes", lambda piece: BYTES(piece) // 2),
    "a view's beginning": (
        "s6, scratch memory", prepared.Recording, "_place", without_offset,
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_pointers_are_noticed(fault, machine, monkeypatch):
    case, *where = FAULTS[fault]
    written, again = step_faultily(machine, case, lambda: monkeypatch.setattr(*where))
    with pytest.raises(AssertionError):
        assert_the_same(written, again)


@pytest.mark.parametrize("case", ["s6, sums in the gradients", "s6, 64 states", "ssd"])
def test_memory_that_is_not_freed_is_noticed(case, machine, monkeypatch):
    def planned(events):
        return PLANNED([event for event in events if not isinstance(event, repeated.Freed)])

    written, again = step_faultily(
        machine, case, lambda: monkeypatch.setattr(repeated, "_planned", planned)
    )
    assert_the_same(written, again)
    assert again.peak > written.peak + ROUNDING


def test_a_retained_graph_gives_its_gradients_twice(machine):
    tensors, options = s6()
    leaves = [t.requires_grad_() for t in tensors.values() if t is not None]
    with Memory() as machine.memory:
        for _ in range(2):
            out = operation("s6 hopper")(**tensors, **options)
            for _ in range(2):
                torch.autograd.grad(out, leaves, torch.empty_like(out), retain_graph=True)
    names = [launch.name for launch in machine.launches]
    assert names == [names[0], *names[1:4] * 2] * 2
