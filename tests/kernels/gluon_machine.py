"""Run Gluon kernels for Hopper on the CPU, from their Python source, with torch.

Checks what a kernel computes and how its partitions hand tiles to each other, not layouts or
fences.
Blocks run in the order of their index, each to its end. What one stores is seen by the others of
its launch once it has set a flag with release after it; a wait for a flag that no earlier block
sets raises. Partitions take turns: each runs until it has to wait. What the GPU does
asynchronously happens as late as the kernel allows: products when they are waited for, and stores
by TMA when their source may be reused, so that a tile overwritten too early gives a wrong result.
Shared memory begins as NaN. A read or write outside a tensor raises, and so does a wait that never
ends: when all partitions of a block wait.

`installed()` replaces `triton.experimental.gluon` while a kernel's module is imported; `Launcher`
then stands for its kernels. It is for a process of its own: the `to` of torch's tensors takes the
language's types too.
"""

import contextlib
import sys
import threading
import types

import torch

_SLICE_S = 0.02  # of a wait, after which it is asked whether it will ever end
_state = threading.local()


class Dtype:
    """An element type as the language has it."""

    def __init__(self, dtype):
        self.torch = dtype
        self.primitive_bitwidth = dtype.itemsize * 8


FLOAT32, BFLOAT16, FLOAT16 = (Dtype(t) for t in (torch.float32, torch.bfloat16, torch.float16))
INT32, INT64 = Dtype(torch.int32), Dtype(torch.int64)
_OF_TORCH = {d.torch: d for d in (FLOAT32, BFLOAT16, FLOAT16, INT32, INT64)}


_tensor_to = torch.Tensor.to


def _to(self, dtype, *args, **kwargs):
    return _tensor_to(self, dtype.torch if isinstance(dtype, Dtype) else dtype, *args, **kwargs)


class Integer(int):
    """A scalar of the language, which is quicker than a tensor of one element."""

    def to(self, dtype):
        kept = dtype in (INT32, INT64)
        return self if kept else torch.tensor(int(self), dtype=dtype.torch)


def _within_integers(name):
    operation = getattr(int, name)

    def made(self, other):
        result = operation(self, other)
        return result if result is NotImplemented else Integer(result)

    return made


for _operation in ("add", "sub", "mul", "floordiv", "mod"):
    for _name in (f"__{_operation}__", f"__r{_operation}__"):
        setattr(Integer, _name, _within_integers(_name))


def extreme(of_integers, of_tensors):
    """Return the language's minimum or maximum."""

    def made(a, b, **_):
        if isinstance(a, int) and isinstance(b, int):
            return Integer(of_integers(a, b))
        return of_tensors(torch.as_tensor(a), torch.as_tensor(b))

    return made


class Pointer:
    """An element of a tensor's memory, or a tensor of them."""

    def __init__(self, base, offset=0):
        self.base, self.offset = base, offset

    @property
    def dtype(self):
        return types.SimpleNamespace(element_ty=_OF_TORCH[self.base.dtype])

    def __add__(self, offset):
        return Pointer(self.base, self.offset + offset)

    def at(self, mask):
        steps = zip(self.base.shape, self.base.stride(), strict=True)
        size = 1 + sum((size - 1) * stride for size, stride in steps)
        flat = torch.as_strided(self.base, (size,), (1,))
        offsets = torch.as_tensor(self.offset)
        mask = torch.ones_like(offsets, dtype=torch.bool) if mask is None else mask
        offsets, mask = torch.broadcast_tensors(offsets, torch.as_tensor(mask))
        inside = (offsets >= 0) & (offsets < flat.numel())
        if bool((mask & ~inside).any()):
            raise IndexError("access outside a tensor")
        return flat, offsets, mask


def load(pointer, mask=None, other=None):
    flat, offsets, mask = pointer.at(mask)
    got = flat[torch.where(mask, offsets, 0)]
    missing = torch.tensor(float("nan") if other is None else other, dtype=got.dtype)
    return torch.where(mask, got, missing)


def store(pointer, value, mask=None):
    flat, offsets, mask = pointer.at(mask)
    value = torch.broadcast_to(torch.as_tensor(value), offsets.shape).to(flat.dtype)
    where, what = offsets[mask], value[mask]
    _state.written.append(lambda: flat.index_copy_(0, where.view(-1), what.view(-1)))


def make_seen():
    """Let other blocks see what the partition has stored."""
    while _state.written:
        _state.written.pop(0)()


def atomic_add(pointer, value, mask=None, *, sem, scope):
    if sem not in ("release", "relaxed") or scope != "gpu":
        raise ValueError(f"unknown order of an atomic operation: {sem}, {scope}")
    if sem == "release":
        make_seen()
    flat, offsets, mask = pointer.at(mask)
    before = flat[torch.where(mask, offsets, 0)].clone()
    flat[offsets[mask]] += torch.broadcast_to(torch.as_tensor(value), mask.shape)[mask]
    return before


def inline_assembly(text, constraints, arguments, **_):
    """Stand for loads that flags are waited for with: an earlier block's, or of this block."""
    if text.startswith(("griddepcontrol", "fence")):  # launches follow one another
        return None
    if text.startswith("prefetch"):
        load(*arguments)  # or it asks for what is nobody's
        return None
    if text.startswith(("mov.b32", "shfl.sync.idx.b32")):
        return arguments[0]
    values = load(*arguments, other=0)
    if text.startswith("ld.acquire.gpu.global.b32"):
        found = (torch.as_tensor(arguments[0].offset), values)
        again = _state.awaited is not None and all(map(torch.equal, _state.awaited, found))
        if again or not bool((values != 0).all()):
            raise RuntimeError("waits for a later block")
        _state.awaited = found
    elif text.startswith("ld.relaxed.gpu.global.b32"):
        values = changed_since(*arguments, values)
    else:
        raise NotImplementedError(text)
    return values


def changed_since(pointer, values):
    """Return what is loaded; if that was what the last such load found there, once it is not."""
    offset = torch.as_tensor(pointer.offset)
    found = (offset, values)
    if _state.polled is not None and all(map(torch.equal, _state.polled, found)):
        idle = threading.Event()
        _state.launch.wait(
            lambda: not torch.equal(load(pointer, other=0), values), lambda: idle.wait(_SLICE_S)
        )
        values = load(pointer, other=0)
    _state.polled = (offset, values)
    return values


class Shared:
    """A tile of shared memory."""

    def __init__(self, data):
        self.data = data
        self.dtype = _OF_TORCH[data.dtype]
        self.shape = list(data.shape)
        self.layout = None

    def index(self, i):
        if not 0 <= i < self.shape[0]:
            raise IndexError("a stage outside the ring")
        return Shared(self.data[int(i)])

    def permute(self, order):
        return Shared(self.data.permute(order))

    def slice(self, start, length, dim=0):
        return Shared(self.data.narrow(dim, start, length))

    def _reinterpret(self, dtype, shape, layout):
        return Shared(self.data.view(shape))

    def load(self, layout):
        return self.data.clone()

    def store(self, value):
        if value.dtype != self.data.dtype or list(value.shape) != self.shape:
            raise TypeError(f"stored {value.dtype} {value.shape} as {self.data.dtype} {self.shape}")
        self.data.copy_(value)


def allocate_shared_memory(dtype, shape, layout):
    if isinstance(layout, Barriers):
        return BarrierRing(shape[0])
    return Shared(torch.full(shape, float("nan"), dtype=dtype.torch))


class Barriers:
    """The layout of barriers."""


class Barrier:
    """Counts arrivals and bytes; each time both are complete, a phase ends."""

    def __init__(self):
        self.condition = threading.Condition()
        self.count = self.arrivals = self.phase = self.missing_bytes = 0

    def update(self, arrivals=0, missing_bytes=0):
        with self.condition:
            self.arrivals += arrivals
            self.missing_bytes += missing_bytes
            if self.arrivals > self.count:
                raise RuntimeError("more arrivals at a barrier than it expects")
            if self.arrivals == self.count and self.missing_bytes == 0:
                self.phase += 1
                self.arrivals = 0
                self.condition.notify_all()

    def wait(self, parity):
        def over():
            return (self.phase & 1) != parity

        def sleep():
            with self.condition:
                self.condition.wait_for(over, _SLICE_S)

        _state.launch.wait(over, sleep)


class BarrierRing:
    """Barriers by stage."""

    def __init__(self, size):
        self.barriers = [Barrier() for _ in range(size)]

    def index(self, i):
        return self.barriers[int(i)]


def init(barrier, count):
    barrier.count = count


class Descriptor:
    """A tensor as TMA sees it: zeros outside on reading, nothing outside on writing."""

    def __init__(self, host):
        storage = host.base
        if storage.data_ptr() % 16:
            raise ValueError("TMA needs addresses of multiples of 16 bytes")
        for stride in host.strides[:-1]:
            if stride * storage.element_size() % 16:
                raise ValueError("TMA needs strides of multiples of 16 bytes")
        self.view = torch.as_strided(storage, tuple(host.shape), tuple(host.strides))
        self.block = tuple(host.block_shape)
        self.dtype = _OF_TORCH[storage.dtype]
        self.layout = host.layout

    def window(self, coordinates):
        """The part of the tensor that a tile covers, and its place in the tile."""
        there, here = [], []
        for start, size, length in zip(coordinates, self.view.shape, self.block, strict=True):
            if int(start) < 0:
                raise IndexError("a tile before a tensor")
            stop = min(int(start) + length, size)
            there.append(slice(min(int(start), size), stop))
            here.append(slice(0, max(0, stop - int(start))))
        return self.view[tuple(there)], tuple(here)


def async_copy_global_to_shared(descriptor, coordinates, barrier, tile):
    part, here = descriptor.window(coordinates)
    block = torch.zeros(descriptor.block, dtype=part.dtype)
    block[here] = part
    tile.data.copy_(block.view(tile.data.shape))
    barrier.update(missing_bytes=-block.numel() * block.element_size())


def async_copy_shared_to_global(descriptor, coordinates, tile):
    part, here = descriptor.window(coordinates)
    _state.stores.append(lambda: part.copy_(tile.data.reshape(descriptor.block)[here]))


def store_wait(pending):
    while len(_state.stores) > pending:
        _state.stores.pop(0)()


def warpgroup_mma(a, b, acc, use_acc=True, is_async=False):
    result = types.SimpleNamespace(value=None)

    def product():
        left = (a.data if isinstance(a, Shared) else a).float()
        start = acc.value if isinstance(acc, types.SimpleNamespace) else acc
        made = left @ b.data.float()
        result.value = made + start if use_acc else made

    _state.products.append(product)
    return result


def warpgroup_mma_wait(pending, deps):
    while len(_state.products) > pending:
        _state.products.pop(0)()
    values = tuple(d.value if isinstance(d, types.SimpleNamespace) else d for d in deps)
    if any(v is None for v in values):
        raise RuntimeError("a product is used before it is complete")
    return values[0] if len(values) == 1 else values


class Launch:
    """One block's partitions."""

    def __init__(self, program, blocks):
        self.program, self.blocks = program, blocks
        self.failed = None
        self.written = []  # not seen by other blocks before the launch ends
        self.running = 1  # partitions that have not ended
        self.turn = threading.Lock()  # held by the partition that runs
        self._lock = threading.Lock()
        self._waits = {}  # thread -> whether what it waits for has come
        self._changes = 0  # of _waits

    def enter(self):
        _state.launch, _state.stores, _state.products, _state.written = self, [], [], []
        _state.polled = _state.awaited = None

    def wait(self, over, sleep):
        """Call `sleep` until `over()`; raises where another partition failed or all wait."""
        if over():
            return
        self._wait_for(over)
        try:
            while not over():
                if self.failed or self._stuck():
                    raise RuntimeError("waits for ever")
                self.turn.release()
                try:
                    sleep()
                finally:
                    self.turn.acquire()
        finally:
            self._wait_for(None)

    def _wait_for(self, over):
        with self._lock:
            self._changes += 1
            if over is None:
                del self._waits[threading.get_ident()]
            else:
                self._waits[threading.get_ident()] = over

    def _stuck(self):
        """Whether nobody is left who could end a wait."""
        with self._lock:
            before, waits = self._changes, list(self._waits.values())
            if len(waits) < self.running:
                return False
        over = any(over() for over in waits)
        return not over and before == self._changes  # none went on meanwhile

    def end_partition(self):
        with self._lock:
            self.running -= 1


def warp_specialize(partitions, warps, registers):
    launch = _state.launch

    def run(function, arguments):
        launch.enter()
        try:
            with launch.turn, torch.no_grad():
                function(*arguments)
            if _state.products or _state.stores:
                raise RuntimeError("a partition ended with work that nobody waited for")
            launch.written += _state.written
        except BaseException as exc:
            launch.failed = launch.failed or exc
        finally:
            launch.end_partition()

    threads = [threading.Thread(target=run, args=p) for p in partitions]
    launch.running = len(threads)
    launch.turn.release()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    launch.turn.acquire()
    launch.running = 1
    if launch.failed:
        raise launch.failed


class Launcher:
    """A kernel, run block by block; keeps how often it was launched."""

    def __init__(self, function):
        self.function = function
        self.launches = 0

    def __getitem__(self, grid):
        def run(*args, num_warps, launch_pdl=False, maxnreg=None, **kwargs):
            self.launches += 1
            assert num_warps == 4
            blocks = []
            for z in range(grid[2]):
                for y in range(grid[1]):
                    for x in range(grid[0]):
                        blocks.append(Launch((x, y, z), grid))
                        blocks[-1].enter()
                        with blocks[-1].turn:
                            self.function(*map(argument, args), **kwargs)
            for block in blocks:
                for write in block.written:
                    write()

        return run


def argument(value):
    if hasattr(value, "block_shape"):
        return Descriptor(value)
    return Pointer(value) if isinstance(value, torch.Tensor) else value


def jit(function=None, **_):
    return function if function is not None else (lambda f: f)


def _language():
    def layout(*_args, **_kwargs):
        return "a layout"

    def full(shape, value, dtype, layout=None):
        return torch.full(shape, value, dtype=dtype.torch)

    layouts = (
        "NVMMADistributedLayout", "DotOperandLayout", "SliceLayout", "SwizzledSharedLayout",
        "BlockedLayout", "DistributedLinearLayout",
    )  # fmt: skip
    return dict.fromkeys(layouts, layout) | {
        "constexpr": lambda value=None: value,
        "float32": FLOAT32, "bfloat16": BFLOAT16, "float16": FLOAT16,
        "int32": INT32, "int64": INT64,
        "program_id": lambda axis: Integer(_state.launch.program[axis]),
        "num_programs": lambda axis: Integer(_state.launch.blocks[axis]),
        "num_warps": lambda: 4,
        "arange": lambda start, end, layout: torch.arange(start, end),
        "full": full,
        "load": load,
        "store": store,
        "exp2": lambda x: torch.exp2(torch.as_tensor(x)),
        "log2": torch.log2,
        "abs": torch.abs,
        "minimum": extreme(min, torch.minimum),
        "maximum": extreme(max, torch.maximum),
        "min": torch.amin,
        "max": torch.amax,
        "sum": lambda value, axis: torch.sum(value, axis),
        "where": lambda c, a, b: torch.where(torch.as_tensor(c), a, b),
        "reshape": torch.reshape,
        "permute": torch.permute,
        "associative_scan": lambda value, axis, _sum: torch.cumsum(value, axis),
        "convert_layout": lambda value, layout, **_: value,
        "thread_barrier": lambda: None,
        "atomic_add": atomic_add,
        "inline_asm_elementwise": inline_assembly,
        "static_range": range,
        "allocate_shared_memory": allocate_shared_memory,
        "warp_specialize": warp_specialize,
    }  # fmt: skip


class _HostLayout:
    @staticmethod
    def get_default_for(shape, dtype):
        return "a layout"


@contextlib.contextmanager
def installed():
    """Stand for Gluon while the block imports kernels; puts the real one back."""
    base = "triton.experimental.gluon"
    language = types.ModuleType(base + ".language")
    language.__dict__.update(_language(), NVMMASharedLayout=_HostLayout)
    hopper = types.ModuleType(base + ".language.nvidia.hopper")
    hopper.mbarrier = types.SimpleNamespace(
        MBarrierLayout=Barriers,
        init=init,
        expect=lambda barrier, size: barrier.update(arrivals=1, missing_bytes=size),
        arrive=lambda barrier, count=1, pred=True: barrier.update(arrivals=count if pred else 0),
        wait=lambda barrier, parity, pred=True: barrier.wait(parity) if pred else None,
    )
    hopper.tma = types.SimpleNamespace(
        async_copy_global_to_shared=async_copy_global_to_shared,
        async_copy_shared_to_global=async_copy_shared_to_global,
        store_wait=store_wait,
    )
    hopper.fence_async_shared = lambda: None
    hopper.warpgroup_mma = warpgroup_mma
    hopper.warpgroup_mma_wait = warpgroup_mma_wait
    host = types.ModuleType(base + ".nvidia.hopper")
    host.TensorDescriptor = types.SimpleNamespace
    gluon = types.ModuleType(base)
    gluon.jit, gluon.constexpr_function, gluon.language = jit, jit, language
    experimental = types.ModuleType("triton.experimental")
    experimental.gluon = gluon
    stand_ins = {
        "triton.experimental": experimental, base: gluon, base + ".language": language,
        base + ".language.nvidia": types.ModuleType(base + ".language.nvidia"),
        base + ".language.nvidia.hopper": hopper,
        base + ".nvidia": types.ModuleType(base + ".nvidia"), base + ".nvidia.hopper": host,
    }  # fmt: skip
    before = {name: sys.modules.get(name) for name in stand_ins}
    sys.modules.update(stand_ins)
    torch.Tensor.to = _to
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module
