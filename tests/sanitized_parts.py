"""What `gpu_sanitize.py` runs: every kernel of the package, on small and odd shapes.

`PARTS` must pass; `PLANTED` (tests/faults/races.py) has what racecheck must find. Every kernel of
`kernels/` is launched by some part, which tests/test_gpu_sanitize.py checks without a GPU.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

HOPPER = "hopper"  # in the name of a part that needs compute capability 9.0


def normal(*shape: int) -> Tensor:
    """Return bf16 values on the GPU."""
    return torch.randn(shape).bfloat16().cuda()


def s6(
    module: str, d_state: int, *, batch: int = 2, channels: int = 34, seqlen: int = 75,
    train: bool = True, **more: Tensor,
) -> None:  # fmt: skip
    """Run a selective scan with every option, forward and backward unless told not to."""
    groups = 2
    wide, shared = (batch, channels, seqlen), (batch, groups, d_state, seqlen)
    inputs = {
        "u": torch.randn(wide).bfloat16(), "delta": torch.randn(wide).bfloat16(),
        "A": -torch.rand(channels, d_state), "B": torch.randn(shared).bfloat16(),
        "C": torch.randn(shared).bfloat16(), "D": torch.randn(channels),
        "z": torch.randn(wide).bfloat16(), "delta_bias": torch.randn(channels), **more,
    }  # fmt: skip
    scan = operation(f"{module}.selective_scan")
    passes(lambda **t: scan(**t, delta_softplus=True, return_last_state=True), inputs, train=train)


def s6_hopper_backward() -> None:
    """Run the backward where blocks add up sums in the gradients, and where in scratch memory."""
    for batch, channels, seqlen in (
        (2, 256, 512),  # two blocks of 64 channels in each group, a segment for each chunk
        (2, 2048, 512),  # segments of two parts
        (9, 2048, 128),  # more batch elements than rows of blocks
        (2, 256, 330),  # a last chunk that is cut short
        (2, 150, 330),  # a last block that is cut short, too
    ):
        s6("kernels.s6.hopper_op", 16, batch=batch, channels=channels, seqlen=seqlen)


def s6_hopper_serial() -> None:
    """Run the forward of many channels, which goes through time in order."""
    for d_state, batch, channels in ((16, 8, 2010), (9, 4, 2002), (72, 2, 1002)):
        sizes = {"batch": batch, "channels": channels, "seqlen": 75}
        s6("kernels.s6.hopper_op", d_state, train=False, **sizes)
    s6("kernels.s6.hopper_op", 16, batch=4, channels=2002, seqlen=75)  # keeps states


def ssd(
    path: str, headdim: int, d_state: int, *, seqlen: int = 150, heads: int = 6,
    gated: bool = True, per_channel: bool = False, train: bool = True, **options: Any,
) -> None:  # fmt: skip
    """Run an SSD with every option, forward and backward unless told not to."""
    batch, groups = 2, 2
    wide, shared = (batch, seqlen, heads, headdim), (batch, seqlen, groups, d_state)
    inputs = {
        "x": torch.randn(wide).bfloat16(), "dt": torch.randn(batch, seqlen, heads).bfloat16(),
        "A": -torch.rand(heads), "B": torch.randn(shared).bfloat16(),
        "C": torch.randn(shared).bfloat16(),
        "D": torch.randn((heads, headdim) if per_channel else (heads,)),
        "dt_bias": torch.randn(heads),
        "initial_states": torch.randn(batch, heads, headdim, d_state),
    }  # fmt: skip
    if gated:
        inputs["z"] = torch.randn(wide).bfloat16()
    op = operation(path)
    given = {"chunk_size": 64, "dt_softplus": True, "return_final_states": True, **options}
    passes(lambda **t: op(**t, **given), inputs, train=train)


def ssd_ungated(path: str) -> None:
    """Run the backward that takes a head's tiles at once: one block of heads, and several."""
    ssd(path, 40, 24, gated=False, segments=2)
    ssd(path, 64, 128, gated=False, per_channel=True, segments=1)
    ssd(path, 64, 128, gated=False, heads=70, seqlen=700)


def ssd_packed(gated: bool) -> None:
    """Run sequences of different lengths in a row of tokens; one spans chunks and segments."""
    ends = (3, 64, 65, 140, 400)
    seq_idx = torch.zeros(2, 450, dtype=torch.int32)
    for end in ends:
        seq_idx[:, end:] += 1
    sizes = {"seqlen": 450, "gated": gated, "seq_idx": seq_idx.cuda()}
    for headdim, d_state in ((40, 24), (64, 128)):
        ssd("kernels.ssd.triton_ssd.ssd", headdim, d_state, segments=3, **sizes)


def ssd_fused() -> None:
    """Run the forward of one launch, whose blocks look back at earlier ones, and alone."""
    path = "kernels.ssd.hopper_op.ssd"
    for headdim, d_state in ((40, 24), (64, 128), (128, 128)):
        ssd(path, headdim, d_state, seqlen=450, train=False)
        ssd(path, headdim, d_state, seqlen=450, train=False, gated=False, segments=5)
    ssd(path, 64, 64, seqlen=150, train=False, per_channel=True, segments=1)


def ssd_forward() -> None:
    """Run the forward of four launches without a backward: segments combined, and summed."""
    for segments in (1, 2, 3):
        sizes = {"heads": 66, "seqlen": 1030, "segments": segments}  # too long for one launch
        ssd("kernels.ssd.hopper_op.ssd", 40, 24, train=False, **sizes)


def state_update() -> None:
    """Update states of both families by one token, with several tilings."""
    from mambench.kernels.state_update.config import CONFIGS
    from mambench.kernels.state_update.triton_update import selective_state_update

    batch, heads, d_state = 3, 10, 20
    for headdim in (None, 24):
        places = (heads,) if headdim is None else (heads, headdim)
        x, dt = normal(batch, *places), normal(batch, heads)
        A = -torch.rand((heads, d_state) if headdim is None else (heads,)).cuda()
        B, C = (normal(batch, 2, d_state) for _ in "BC")
        for config in CONFIGS[:: 1 if headdim is None else 4]:
            state = normal(batch, *places, d_state)
            selective_state_update(state, x, dt, A, B, C, z=x, dt_softplus=True, config=config)


def around_mixers() -> None:
    """Run what blocks run around their mixers, forward and backward, at odd sizes."""
    from mambench.kernels.conv.triton_conv import conv_backward, conv_forward
    from mambench.kernels.elementwise import triton_elementwise as elementwise
    from mambench.kernels.norm.triton_norm import norm_backward, norm_forward

    batch, channels, seqlen = 2, 70, 301
    weight, bias = normal(channels, 4), normal(channels)
    for last in (False, True):
        x = normal(batch, seqlen, channels).mT if last else normal(batch, channels, seqlen)
        dout = (x[:, :40], x[:, 40:55], x[:, 55:]) if last else (x,)
        conv_forward(x, weight, bias, True)
        conv_backward(x, weight, bias, dout, True, more=None if last else normal(*x.shape))
    for width in (20, 301, 2048):
        for z in (None, normal(37, width)):
            x, scale, dout = normal(37, width), normal(width), normal(37, width)
            _, rstd = norm_forward(x, scale, z, 1e-5)
            norm_backward(x, scale, z, rstd, dout, residual=x, give_out=True, overwrite=True)
    tables = normal(seqlen, 1, 1, 24), normal(seqlen, 1, 1, 24)
    elementwise.rotate_(normal(batch, seqlen, 3, 3, 24), *tables)
    elementwise.rotate_back(*(normal(batch, seqlen, 3, 24) for _ in "qkv"), *tables)
    elementwise.gated_product_backward(normal(37, 602), normal(37, 301))
    elementwise.gated_product(normal(37, 602))


def measuring() -> None:
    """Run what waits, reads clocks and finds a device's ceilings."""
    from mambench.kernels import ceilings_triton, probes

    probes.spin(probes.new_record(), 1000)
    probes.read_timer(probes.timer_steps(8))
    probes.chain(probes.chain_out(), 3)
    source = torch.randn(3 * probes.BLOCK).cuda()
    target, totals = torch.empty_like(source), source[:3].clone()
    probes.copy(source, target)
    probes.total(source, totals)
    for found in (ceilings_triton.exponentials, ceilings_triton.multiply_adds):
        found(totals, 3)
    ceilings_triton.nothing(totals)


PARTS: dict[str, Callable[[], None]] = {
    "s6 triton": lambda: s6("kernels.s6.triton_scan", 16),
    "s6 triton, from a state": lambda: s6(
        "kernels.s6.triton_scan", 20, seqlen=331, initial_state=torch.randn(2, 34, 20)
    ),
    "s6 hopper": lambda: s6("kernels.s6.hopper_op", 20),
    "s6 hopper, 128 states": lambda: s6("kernels.s6.hopper_op", 128),
    "s6 hopper, forward": lambda: s6("kernels.s6.hopper_op", 20, train=False),
    "s6 hopper, many channels": s6_hopper_serial,
    "s6 hopper, sums in gradients": s6_hopper_backward,
    "s6 associative": lambda: s6("kernels.scan_triton", 16),
    "ssd triton": lambda: ssd("kernels.ssd.triton_ssd.ssd", 40, 24, segments=2),
    "ssd triton, ungated": lambda: ssd_ungated("kernels.ssd.triton_ssd.ssd"),
    "ssd triton, packed": lambda: ssd_packed(True),
    "ssd triton, packed, ungated": lambda: ssd_packed(False),
    "ssd hopper": lambda: ssd("kernels.ssd.hopper_op.ssd", 40, 24, segments=2),
    "ssd hopper, widest": lambda: ssd("kernels.ssd.hopper_op.ssd", 64, 128, segments=2),
    "ssd hopper, ungated": lambda: ssd_ungated("kernels.ssd.hopper_op.ssd"),
    "ssd hopper, one launch": ssd_fused,
    "ssd hopper, forward": ssd_forward,
    "ssd associative": lambda: ssd("kernels.scan_triton.state_space_dual", 8, 16),
    "state update": state_update,
    "around mixers": around_mixers,
    "measuring": measuring,
    "hand-over, hopper": lambda: races().hand_over(),
}
# What racecheck must find, or it would find nothing elsewhere either.
PLANTED: dict[str, Callable[[], None]] = {
    "planted: partitions that do not wait, hopper": lambda: races().unsynchronised(),
    "planted: lanes that round a sum differently": lambda: races().contracted_sum(),
}


def races() -> ModuleType:
    """Import the kernels with races, which are no part of the package."""
    spec = spec_from_file_location("races", Path(__file__).parent / "faults" / "races.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def operation(path: str) -> Callable[..., Any]:
    """Import an operation by its path within the package."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(f"mambench.{module}"), name)


def passes(op: Callable[..., Any], inputs: dict[str, Tensor], *, train: bool) -> None:
    """Run both passes; or the forward alone, twice: the second repeats the first's launches."""
    leaves = {name: t.cuda().requires_grad_(train) for name, t in inputs.items()}
    outputs = op(**leaves)
    if train:
        torch.autograd.grad(outputs, list(leaves.values()), [torch.ones_like(o) for o in outputs])
    else:
        op(**leaves)
