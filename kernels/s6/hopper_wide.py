"""Selective scan backward on Hopper of more than 16 states: the launcher of `hopper_wide_kernel`.

The forward keeps so few states that they fit into du, where they are moved; what each segment of
time passes back lies in ddelta before it is written. `hopper_wide_memory` says what comes on top.
"""

from typing import Any

import torch
from torch import Tensor

from mambench.kernels.integers import ceil_div, next_power_of_2
from mambench.kernels.prepared import Recording
from mambench.kernels.s6.hopper_backward_kernel import segment_adjoint_kernel
from mambench.kernels.s6.hopper_memory import STATES
from mambench.kernels.s6.hopper_scan import row_unit
from mambench.kernels.s6.hopper_small import MOVE, move_states_kernel, pass_back_kernel
from mambench.kernels.s6.hopper_wide_kernel import scan_backward_wide_kernel
from mambench.kernels.s6.hopper_wide_memory import Plan, WideConfig, plan, scratch_elements

ADJOINT_CHUNK, ADJOINT_CHANNELS, ADJOINT_WARPS = 32, 2, 4
ADJOINT_BLOCK = 8 * ADJOINT_CHANNELS * ADJOINT_WARPS


def specialisation(
    *, d_state: int, unit: int, has_D: bool, has_z: bool, has_bias: bool, softplus: bool,
    has_r: bool, in_du: bool, first: bool, last: bool, plan: Plan, config: WideConfig,
) -> dict[str, int | bool]:  # fmt: skip
    """Return the kernel's compile-time arguments for a problem."""
    places = 2 * config.states * plan.exchange
    share = max(4, next_power_of_2(ceil_div(places, plan.blocks)))
    across = min(config.warps, share // 4)
    at_once = 32 // min(32, share // 4 // across) * (config.warps // across)
    at_once *= min(4, next_power_of_2(ceil_div(plan.blocks, at_once)))
    return {
        "D_STATE": d_state,
        "HAS_D": has_D,
        "HAS_Z": has_z,
        "HAS_BIAS": has_bias,
        "SOFTPLUS": softplus,
        "HAS_R": has_r,
        "IN_DU": in_du,
        "BEFORE": int(plan.before),
        "HEADS": in_du and plan.heads,
        "FIRST": first,
        "LAST": last,
        "SPAN": config.chunk,
        "MID": config.mid or config.chunk,
        "STAGE": config.stage,
        "EXCHANGE": plan.exchange,
        "SLOTS": plan.slots,
        "NOTE": config.note,
        "TILE": config.tile,
        "UNIT": unit,
        "LANES_N": config.lanes_n,
        "WARPS_N": config.warps_n,
        "WARPS_D": config.warps_d,
        "SHARE": share,
        "SOURCES": at_once,
        "EVEN": share * plan.blocks == places and plan.blocks % at_once == 0,
    }


class WideRun:
    """One backward: its buffers and launches, in the order in which memory becomes free."""

    def __init__(
        self, recording: Recording, inputs: Any, tokens: Any, config: WideConfig, *, slots: int,
        segments: int | None = None,
    ) -> None:  # fmt: skip
        self.recording = recording
        self.inputs, self.tokens, self.config = inputs, tokens, config
        names = ("batch", "seqlen", "d_inner", "d_state", "ngroups")
        self.sizes = {name: inputs.sizes[name] for name in names}
        itemsize = tokens.u.element_size()
        self.plan = plan(config, **self.sizes, itemsize=itemsize, resident=slots, segments=segments)

    def __call__(
        self, tensors: list[Any], dlast: Tensor | None, *, give: bool
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients, in fp32 where they are of parameters.

        The kept states are the last of the tensors; give: they may be freed once they are in du.
        """
        batch, seqlen, d_inner, d_state, ngroups = self.sizes.values()
        tokens, plan, device = self.tokens, self.plan, self.tokens.u.device
        recording, shape, dtype = self.recording, tuple(tokens.u.shape), tokens.u.dtype
        du = recording.output(shape, dtype, device)
        scratch = self._scratch(device)
        in_du = give and plan.in_du
        states = self._moved(tensors, du, scratch["heads"]) if in_du else tensors[-1]
        ddelta = recording.output(shape, dtype, device)
        several = plan.segments > 1
        counters = scratch["counters"].view(torch.int32)
        r, strides = dlast, (d_inner * d_state, 0, d_state)
        total = scratch["parts"]  # sums of dt by segment, before it is used
        if several:
            r, strides = self._passed(ddelta, scratch["r"])
            self._make_adjoints(r, strides, total)
        self._pass_back(r, strides, total, dlast, counters)
        dz = None if tokens.z is None else recording.output(shape, dtype, device)
        dA, dD, dbias = recording.output(
            (d_inner * (d_state + 2),), torch.float32, device
        ).split([d_inner * d_state, d_inner, d_inner])  # fmt: skip
        dBC = recording.output((2, batch, ngroups, d_state, seqlen), dtype, device)
        each = counters.numel() // plan.launches
        for launch in range(plan.launches):
            self._launch(
                launch, states, r, strides, du, ddelta, dz, counters[launch * each :], dA, dD,
                dbias, dBC, scratch, in_du=in_du, has_r=several or dlast is not None,
            )  # fmt: skip
        return du, ddelta, dA.view(d_inner, d_state), dBC[0], dBC[1], dD, dz, dbias

    def _launch(
        self, launch: int, states: Tensor, r: Tensor | None, strides: tuple[int, int, int],
        du: Tensor, ddelta: Tensor, dz: Tensor | None, counters: Tensor, dA: Tensor, dD: Tensor,
        dbias: Tensor, dBC: Tensor, scratch: dict[str, Tensor], *, in_du: bool, has_r: bool,
    ) -> None:  # fmt: skip
        """Launch the kernel for its share of the channels."""
        batch, seqlen, d_inner, d_state, ngroups = self.sizes.values()
        tokens, inputs, plan, config = self.tokens, self.inputs, self.plan, self.config
        unit = self._unit(du, ddelta)
        arguments = (
            tokens.u, tokens.delta, inputs.A, tokens.B, tokens.C, inputs.D, tokens.z,
            inputs.bias, tokens.dout, states, scratch["heads"] if plan.heads else None, r,
            du, ddelta, dz, scratch["parts"], scratch["sums"] if plan.launches > 1 else None,
            counters, dA, dD, dbias, dBC, batch, seqlen // unit, d_inner, ngroups, plan.blocks,
            ceil_div(seqlen, config.chunk), plan.segment_spans, plan.segments, plan.rows,
            *strides, launch * plan.blocks,
        )  # fmt: skip
        constants = specialisation(
            d_state=d_state, unit=unit, has_D=inputs.D is not None,
            has_z=tokens.z is not None, has_bias=inputs.bias is not None,
            softplus=inputs.softplus, has_r=has_r, in_du=in_du, first=launch == 0,
            last=launch == plan.launches - 1, plan=plan, config=config,
        )  # fmt: skip
        self.recording.launch(
            scan_backward_wide_kernel,
            (plan.rows * ngroups * plan.blocks,),
            arguments,
            constants,
            num_warps=config.warps,
            maxnreg=config.registers,
            launch_cooperative_grid=True,
        )

    def _unit(self, *more: Tensor) -> int:
        """Return what every row's start is a multiple of."""
        given = (t for t in (*self.tokens, *more) if t is not None)
        return row_unit(self.sizes["seqlen"], tuple(given))

    def _scratch(self, device: torch.device) -> dict[str, Tensor]:
        sizes = {name: n for name, n in self.sizes.items() if name != "d_state"}
        elements = scratch_elements(self.plan, self.config, **sizes, d_state=self.sizes["d_state"])
        memory = self.recording.scratch((sum(elements.values()),), torch.float32, device)
        return dict(zip(elements, memory.split(list(elements.values())), strict=True))

    def _moved(self, tensors: list[Any], du: Tensor, heads: Tensor) -> Tensor:
        """Move the kept states into du and free them; return where they are."""
        _, seqlen, d_inner, d_state, _ = self.sizes.values()
        kept, plan, span, words = tensors[-1], self.plan, self.config.chunk, _words(du)
        if seqlen > span:
            arguments = (
                kept, words, heads if plan.heads else None, seqlen, d_inner, kept.shape[1],
                plan.segment_spans, plan.segments,
            )  # fmt: skip
            constants = {
                "D_STATE": d_state, "SPAN": span, "FIRST": 1, "BEFORE": int(plan.before),
                "HEADS": plan.heads, "WORD": du.element_size(), "BLOCK": MOVE,
            }  # fmt: skip
            grid = (kept.shape[0] * kept.shape[1] * ceil_div(d_inner * d_state, MOVE),)
            self.recording.launch(move_states_kernel, grid, arguments, constants, num_warps=4)
        self.recording.free(kept)
        return words

    def _passed(self, ddelta: Tensor, r: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """Return where what is passed back to each segment goes, and its strides."""
        _, seqlen, d_inner, d_state, _ = self.sizes.values()
        plan, itemsize = self.plan, ddelta.element_size()
        if not plan.r_in_ddelta:
            return r, (plan.segments * d_inner * d_state, d_inner * d_state, d_state)
        pitch = seqlen * itemsize // 4
        each = plan.segment_spans * self.config.chunk * itemsize // 4
        return _words(ddelta), (d_inner * pitch, each, pitch)

    def _make_adjoints(self, r: Tensor, strides: tuple[int, int, int], total: Tensor) -> None:
        """Launch the kernel that makes what each segment passes back."""
        batch, seqlen, d_inner, d_state, ngroups = self.sizes.values()
        tokens, plan, inputs = self.tokens, self.plan, self.inputs
        unit = self._unit()
        blocks = ceil_div(d_inner // ngroups, ADJOINT_BLOCK)
        state_blocks = ceil_div(d_state, STATES)
        programs = batch * (plan.segments - 1) * ngroups * blocks * state_blocks
        arguments = (
            tokens.delta, inputs.A, tokens.C, tokens.z, inputs.bias, tokens.dout,
            r, total, None, None, seqlen // unit, d_inner, ngroups, blocks,
            plan.segment_spans * self.config.chunk // ADJOINT_CHUNK, plan.segments, 1,
            *strides, ceil_div(seqlen, ADJOINT_CHUNK), 0, 0, 0,
        )  # fmt: skip
        constants = {
            "D_STATE": d_state, "STATE_BLOCKS": state_blocks, "HAS_Z": tokens.z is not None,
            "HAS_BIAS": inputs.bias is not None, "SOFTPLUS": inputs.softplus, "MOVE": 0,
            "CHUNK": ADJOINT_CHUNK, "UNIT": unit, "CHANNELS": ADJOINT_CHANNELS,
            "WARPS": ADJOINT_WARPS,
        }  # fmt: skip
        options = {"num_warps": ADJOINT_WARPS}
        self.recording.launch(segment_adjoint_kernel, (programs,), arguments, constants, **options)

    def _pass_back(
        self, r: Tensor | None, strides: tuple[int, int, int], total: Tensor,
        dlast: Tensor | None, counters: Tensor,
    ) -> None:  # fmt: skip
        """Make of what each segment passes back what each gets; clear the counters."""
        batch, _, d_inner, d_state, _ = self.sizes.values()
        segments, block = self.plan.segments, 256
        size = batch * d_inner * d_state if segments > 1 else 0
        arguments = (
            self.inputs.A, total, dlast, r if segments > 1 else total, counters,
            size, segments, d_inner, *strides, counters.numel(),
        )  # fmt: skip
        constants = {
            "D_STATE": d_state, "HAS_LAST": dlast is not None, "BLOCK": block,
            "AHEAD": min(16, next_power_of_2(segments)),
        }  # fmt: skip
        grid = (max(1, ceil_div(size, block)),)
        self.recording.launch(pass_back_kernel, grid, arguments, constants, num_warps=4)


def _words(tensor: Tensor) -> Tensor:
    """Return a tensor's memory as fp32; what is past the last whole word is left out."""
    flat = tensor.view(-1)
    words = flat.numel() * flat.element_size() // 4
    return flat[: words * 4 // flat.element_size()].view(torch.float32)
