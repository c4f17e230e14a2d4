"""The pinned tilings fit the registers of the architectures they are pinned for."""

import pytest

pytest.importorskip("triton")

FEW_BYTES = 24  # six registers, outside of the loops: what whole_kernel spills; the gated ones two
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 120: 99 << 10}  # most that one program may have


@pytest.mark.parametrize(("arch", "gated"), [(80, True), (90, True), (90, False)])
def test_no_kernel_spills_its_registers(resources, arch, gated):
    found = resources.usages("bf16", 64, 128, arch, gated=gated)
    assert not {name: u.text for name, u in found.items() if u.stack_bytes > FEW_BYTES}
    assert not {name: u.text for name, u in found.items() if u.shared_bytes > SHARED_BYTES[arch]}


@pytest.mark.slow
def test_the_walks_over_states_compile_for_blackwell(binaries):
    """Triton 3.6 lays a tile that is summed twice, one axis after the other, out wrongly there."""
    found = binaries("ssd triton bf16 P=64 N=128", 100, "state_kernel")
    assert found["state_kernel"].stack_bytes == 0


def test_a_tile_that_is_too_large_is_seen_to_spill(resources, monkeypatch):
    from dataclasses import replace

    from mambench.kernels.ssd import triton_config, triton_ssd

    tiles = replace(triton_config.tiling(2, 64, 128, wgmma=True), block_p=64)
    constants = {
        "P": 64, "N": 128, "BLOCK_N": 128, "PRECISION": "tf32", "HAS_Z": False, "nheads": 32,
        "D_DIMS": 1, "STORE_FINAL": True, "HAS_SEQ": False, "HAS_ENTRY": True,
        "BLOCK_P": 64, "Q": tiles.chunk, "STAGES": 2,
    }  # fmt: skip
    usage = resources.compiled(triton_ssd.scan_kernel, constants, 4, dtype="bf16", arch=80)
    assert usage.stack_bytes > FEW_BYTES
