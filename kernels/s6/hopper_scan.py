"""Selective scan forward on Hopper: the launcher of its two kernels, and what they support.

`hopper_kernel` divides time over the lanes of a warp, `hopper_serial` states and channels; `choose`
takes one by the number of channels that a GPU has to keep it busy.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from mambench.kernels.integers import ceil_div
from mambench.kernels.prepared import Calls, Recording
from mambench.kernels.s6.arguments import check_arguments
from mambench.kernels.s6.hopper_kernel import scan_forward_kernel
from mambench.kernels.s6.hopper_serial import serial_scan_kernel

RUN = 16  # steps in a lane's registers
STATES = 16  # states per block of B and C in shared memory, and per queue of carries


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the kernel is built: channels a warp, warps a block, B and C widened once or not."""

    channels: int = 1
    warps: int = 16
    wide: bool = True
    registers: int | None = (
        None  # limit for a thread, so that more blocks fit; None: the compiler's
    )

    @property
    def block(self) -> int:
        """Channels of a thread block."""
        return self.channels * self.warps


@dataclass(frozen=True, kw_only=True)
class SerialConfig:
    """How the serial kernel is built.

    A warp's lanes that share a channel, channels a thread, warps of a block over states and over
    channels, steps staged in shared memory, steps in registers.
    """

    lanes: int = 4
    channels: int = 2
    warps_n: int = 1
    warps_d: int = 4
    tile: int = 32
    steps: int = 8
    registers: int | None = None

    @property
    def block(self) -> int:
        """Channels of a thread block."""
        return 32 // self.lanes * self.channels * self.warps_d

    @property
    def warps(self) -> int:
        """Warps of a thread block."""
        return self.warps_n * self.warps_d


_FEW_STATES = (SerialConfig(), SerialConfig(channels=1, warps_d=2))
_MANY_STATES = SerialConfig(channels=1, warps_n=8, warps_d=2, tile=64)
_STATES_OF_16 = 176  # of 16 channels, in fp32 or widened, that shared memory has place for
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def supported(*, d_state: int, dtype: torch.dtype) -> str | None:
    """Return why the kernel cannot serve a problem, or None; lengths, channels and groups are free.

    That the device has compute capability 9.0 is the caller's to check.
    """
    if dtype not in _DTYPES:
        return f"dtype {dtype}: the Hopper scan takes bfloat16, float16 and float32"
    if not 1 <= d_state <= 256:
        return f"d_state {d_state}: the Hopper scan takes 1 to 256"
    return None


@lru_cache(maxsize=256)
def choose(
    *, batch: int, d_inner: int, d_state: int, checkpoint_every: int | None, multiprocessors: int,
    dtype: torch.dtype = torch.bfloat16,
) -> Config | SerialConfig:  # fmt: skip
    """Return the kernel and its configuration for a problem, by what an H100 measured.

    The serial kernel wherever its channels alone keep the multiprocessors busy: two warps for every
    scheduler up to 16 states, with as many channels a thread as that leaves, and from 65 to 128
    states where there are more channels than 8 for each multiprocessor. Otherwise time over lanes,
    with the fewest warps a block that leave none waiting for a multiprocessor, and with B and C
    widened once where no states are kept for a backward and shared memory has place for it.
    """
    channels = batch * d_inner
    for serial in _FEW_STATES if d_state <= STATES else ():
        busy = 16 * serial.warps * channels >= 15 * 2 * 4 * multiprocessors * serial.block
        if busy and _aligned(checkpoint_every, serial):
            return serial
    many = 64 < d_state <= 128 and channels > 8 * multiprocessors
    if many and _aligned(checkpoint_every, _MANY_STATES):
        return _MANY_STATES
    warps = next((few for few in (4, 8) if channels <= few * multiprocessors), 16)
    if dtype == torch.float32:
        return Config(warps=min(warps, 8) if d_state > _STATES_OF_16 else warps)
    if checkpoint_every is None and (warps < 16 or d_state <= _STATES_OF_16):
        return Config(warps=warps)
    return Config(warps=4 if warps < 16 else 16, wide=False)  # of which two share a multiprocessor


def _aligned(checkpoint_every: int | None, serial: SerialConfig) -> bool:
    return checkpoint_every is None or checkpoint_every % serial.tile == 0


def padded_states(d_state: int) -> int:
    """Return the states that the serial kernel computes with: a power of two of at least 16."""
    return max(16, 1 << (d_state - 1).bit_length())


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def scan_forward(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    *,
    checkpoint_every: int | None = None,
    config: Config | SerialConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Run the selective scan forward on a Hopper GPU.

    u, delta, z (B, D, L) and B, C (B, G, N, L) of one dtype (bf16, fp16 or fp32); A (D, N), D and
    delta_bias (D,) fp32; G divides the channels. Returns out (B, D, L) in the inputs' dtype, the
    last state (B, D, N) fp32, and, with checkpoint_every = K (a multiple of 16), the fp32 states
    (B, ceil(L / K), D, N) before the steps 0, K, 2 K, ... Without a config `choose` takes one.
    Raises ValueError and TypeError for what `check_arguments` and `supported` refuse.
    """
    tensors = (u, delta, A, B, C, D, z, delta_bias)
    return _calls(tensors, (delta_softplus, checkpoint_every, config))  # pyright: ignore


def _ready(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[Any, ...]:
    """Check the arguments; return them contiguous, the parameters in fp32."""
    check_arguments(*tensors)
    u, delta, A, B, C, D, z, delta_bias = tensors
    reason = supported(d_state=A.shape[1], dtype=u.dtype)
    if reason is not None:
        raise TypeError(reason)
    u, delta, B, C = (t.contiguous() for t in (u, delta, B, C))
    z = None if z is None else z.contiguous()
    A, D, delta_bias = (
        None if t is None else t.to(torch.float32).contiguous() for t in (A, D, delta_bias)
    )
    return u, delta, A, B, C, D, z, delta_bias


def _run(recording: Recording, tensors: tuple[Any, ...], options: tuple[Any, ...]) -> Any:
    """Launch the kernel of the configuration given or chosen."""
    u, delta, _, B, C, D, z, delta_bias = tensors
    softplus, every, config = options
    batch, d_inner, seqlen = u.shape
    ngroups, d_state = B.shape[1], B.shape[2]
    config = config or choose(
        batch=batch, d_inner=d_inner, d_state=d_state, checkpoint_every=every,
        multiprocessors=_multiprocessors(u.device), dtype=u.dtype,
    )  # fmt: skip
    serial = isinstance(config, SerialConfig)
    grain = config.tile if serial else RUN
    if every is not None and every % grain:
        raise ValueError(f"checkpoint_every {every} is not a multiple of {grain}")
    out = recording.output((batch, d_inner, seqlen), u.dtype, u.device)
    last_state = recording.output((batch, d_inner, d_state), torch.float32, u.device)
    checkpoints, n_checkpoints = None, 0
    if every is not None:
        n_checkpoints = ceil_div(seqlen, every)
        shape = (batch, n_checkpoints, d_inner, d_state)
        checkpoints = recording.output(shape, torch.float32, u.device)
    unit = row_unit(seqlen, (u, delta, B, C, out) if z is None else (u, delta, B, C, z, out))
    blocks_per_group = ceil_div(d_inner // ngroups, config.block)
    sizes = (seqlen // unit, d_inner, ngroups, *(() if serial else (d_state,)))
    constants = specialisation(
        d_inner=d_inner, ngroups=ngroups, d_state=d_state, dtype=u.dtype, unit=unit,
        has_D=D is not None, has_z=z is not None, has_bias=delta_bias is not None,
        softplus=softplus, checkpoint_every=every, config=config,
    )  # fmt: skip
    recording.launch(
        serial_scan_kernel if serial else scan_forward_kernel,
        (batch * ngroups * blocks_per_group, 1, 1),
        (*tensors, out, last_state, checkpoints, *sizes, blocks_per_group, n_checkpoints),
        constants,
        num_warps=config.warps,
        maxnreg=config.registers,
    )
    return out, last_state, checkpoints


_calls = Calls(_run, _ready)


def row_unit(seqlen: int, tensors: tuple[torch.Tensor, ...]) -> int:
    """Return how many elements every row's start is a multiple of: 8, 2 or 1."""
    if any(t.data_ptr() % 16 for t in tensors):
        return 1
    return next(unit for unit in (8, 2, 1) if seqlen % unit == 0)


def specialisation(
    *, d_inner: int, ngroups: int, d_state: int, dtype: torch.dtype, unit: int,
    has_D: bool, has_z: bool, has_bias: bool, softplus: bool,
    checkpoint_every: int | None, config: Config | SerialConfig,
) -> dict[str, int | bool]:  # fmt: skip
    """Return the kernel's compile-time arguments for a problem."""
    shared: dict[str, int | bool] = {
        "HAS_D": has_D,
        "HAS_Z": has_z,
        "HAS_BIAS": has_bias,
        "SOFTPLUS": softplus,
        "CHECKPOINT_EVERY": checkpoint_every or 0,
        "MASK_CHANNELS": d_inner // ngroups % config.block != 0,
        "UNIT": unit,
        "CHANNELS": config.channels,
    }
    if isinstance(config, SerialConfig):
        return shared | {
            "D_STATE": d_state,
            "N": padded_states(d_state),
            "LANES": config.lanes,
            "WARPS_N": config.warps_n,
            "WARPS_D": config.warps_d,
            "TILE": config.tile,
            "STEPS": config.steps,
        }
    return shared | {
        "MASK_STATES": d_state % STATES != 0,
        "STATE_BLOCKS": ceil_div(d_state, STATES),
        "WIDE": config.wide and dtype != torch.float32,
        "WARPS": config.warps,
    }
