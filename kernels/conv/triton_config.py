"""How the causal convolution's kernels are cut up; imports neither torch nor triton.

Fixed tables and no tuning at run time: the same shape runs the same code in every process.
"""

from dataclasses import dataclass

# Warps that keep a large GPU busy with reading: 16 for each of an H100's 132 SMs, about.
_WANTED_WARPS = 2048


@dataclass(frozen=True, kw_only=True)
class TimeConfig:
    """Tile where time is contiguous: channels, steps (a multiple of 8) and warps of a program."""

    block_c: int = 4
    block_t: int = 256
    warps: int = 4
    segment: int = 2048  # backward: steps whose gradients of the weights a program adds up


@dataclass(frozen=True, kw_only=True)
class ChannelConfig:
    """Tile where channels are contiguous: runs side by side, channels, and the walk of a run.

    `steps` is a multiple of `ahead`, the steps that are loaded before they are used.
    """

    rows: int = 4
    block_c: int = 128
    steps: int = 32
    ahead: int = 4
    warps: int = 4


TIME_FORWARD = TimeConfig(block_c=8, block_t=256, warps=4)
TIME_BACKWARD = TimeConfig(block_c=8, block_t=256, warps=8)


def time_segment(*, batch: int, channels: int, seqlen: int, config: TimeConfig) -> int:
    """Return the steps of a segment of the backward, a multiple of the tile's.

    Halved until the GPU is busy: every segment leaves partial sums of 20 bytes a channel.
    """
    segment = max(config.block_t, config.segment // config.block_t * config.block_t)
    blocks = batch * _ceil(channels, config.block_c) * config.warps
    while segment > config.block_t and blocks * _ceil(seqlen, segment) < _WANTED_WARPS:
        segment = _ceil(segment // 2, config.block_t) * config.block_t
    return segment


def channel_config(*, batch: int, channels: int, seqlen: int, backward: bool) -> ChannelConfig:
    """Return the tile where channels are contiguous; a run's ends are read twice.

    Runs are as long as leaves the GPU busy. The backward takes half the channels a thread: with
    more, its sums take the registers that other warps would have.
    """
    for steps in (64, 32, 16):
        config = ChannelConfig(steps=steps)
        if backward:
            config = ChannelConfig(steps=steps, block_c=64, ahead=8)
        runs = _ceil(seqlen, steps * config.rows)
        if batch * _ceil(channels, config.block_c) * runs * config.warps >= _WANTED_WARPS:
            break
    return config


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
