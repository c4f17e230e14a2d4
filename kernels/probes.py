"""Kernels whose time or traffic is known beforehand: what an instrument is held against.

`spin` waits a number of SM clock cycles and keeps a record of its own by the GPU's global timer,
which ticks in real nanoseconds whatever the SM clock does. That timer may step by as much as a
microsecond: the record sums over executions, whose phases against the steps differ, so that the
mean is known far better than one step. `chain` computes and touches no memory but its result;
`copy` and `total` move a known number of bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import globaltimer

BLOCK = 4096
CHAIN_BLOCK = 1024
CHAINS_PER_SM = 4


@triton.jit
def _sm_clock():
    return tl.inline_asm_elementwise(
        "mov.u64 $0, %clock64;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["cycles"])
def _spin_kernel(record_ptr, cycles):
    begin_ns = globaltimer()
    begin = _sm_clock()
    now = begin
    while now - begin < cycles:
        now = _sm_clock()
    end_ns = globaltimer()
    tl.atomic_add(record_ptr, 1, sem="relaxed")
    tl.atomic_add(record_ptr + 1, end_ns - begin_ns, sem="relaxed")
    tl.atomic_add(record_ptr + 2, now - begin, sem="relaxed")


@triton.jit
def _timer_kernel(steps_ptr, count):
    last = globaltimer()
    for i in range(count):
        now = globaltimer()
        while now == last:
            now = globaltimer()
        tl.store(steps_ptr + i, now - last)
        last = now


@triton.jit
def _now_kernel(now_ptr):
    tl.store(now_ptr, globaltimer())


@triton.jit(do_not_specialize=["rounds"])
def _chain_kernel(out_ptr, rounds, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = offsets.to(tl.float32) * 1e-6
    for _ in range(rounds):
        value = tl.exp2(-value)
    tl.store(out_ptr + offsets, value)


@triton.jit
def _copy_kernel(source_ptr, target_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target_ptr + offsets, tl.load(source_ptr + offsets))


@triton.jit
def _total_kernel(source_ptr, out_ptr, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    values = tl.load(source_ptr + program * BLOCK + tl.arange(0, BLOCK))
    tl.store(out_ptr + program, tl.sum(values, axis=0))


def new_record() -> Tensor:
    """Return an empty record of `spin`: (3,) int64, executions, nanoseconds, cycles."""
    return torch.zeros(3, dtype=torch.int64, device="cuda")


def spin(record: Tensor, cycles: int) -> None:
    """Wait this many SM clock cycles; add one execution and its own time to the record."""
    _spin_kernel[(1,)](record, cycles, num_warps=1)


def read_record(record: Tensor) -> tuple[int, int, int]:
    """Wait, and return executions, nanoseconds and cycles of a record of `spin`."""
    executions, nanoseconds, cycles = record.tolist()
    return executions, nanoseconds, cycles


def l2_bytes() -> int:
    """Return the size of the current device's L2."""
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)


def sm_count() -> int:
    """Return how many multiprocessors the current device has."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return int(properties.multi_processor_count)


def timer_steps(count: int = 256) -> Tensor:
    """Return (count,) int64, the steps in ns that the global timer was seen to make."""
    steps = torch.empty(count, dtype=torch.int64, device="cuda")
    _timer_kernel[(1,)](steps, count, num_warps=1)
    return steps


def read_timer(now: Tensor) -> None:
    """Store the global timer, in ns, into (1,) int64."""
    _now_kernel[(1,)](now, num_warps=1)


def chain_out() -> Tensor:
    """Return what `chain` writes, enough to fill the device: fp32."""
    count = CHAINS_PER_SM * sm_count() * CHAIN_BLOCK
    return torch.empty(count, dtype=torch.float32, device="cuda")


def chain(out: Tensor, rounds: int) -> None:
    """Take 2 ** -x this many times over, one after the other, in every element of `out`."""
    _chain_kernel[(out.numel() // CHAIN_BLOCK,)](out, rounds, BLOCK=CHAIN_BLOCK)


def copy(source: Tensor, target: Tensor) -> None:
    """Copy fp32 values with a kernel; the size is a multiple of BLOCK."""
    _copy_kernel[(source.numel() // BLOCK,)](source, target, BLOCK=BLOCK)


def total(source: Tensor, out: Tensor) -> None:
    """Sum each BLOCK values of `source` (a multiple of it, fp32) into one of `out`."""
    _total_kernel[(source.numel() // BLOCK,)](source, out, BLOCK=BLOCK)
