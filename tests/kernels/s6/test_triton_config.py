import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mambench.kernels.s6.triton_config as config

SIZES = {"batch": 1, "seqlen": 8192, "d_inner": 2048, "d_state": 16, "ngroups": 1}

sizes = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 64),
        "seqlen": st.integers(1, 1 << 20),
        "d_inner": st.integers(1, 512).map(lambda n: 8 * n),
        "d_state": st.integers(1, 256),
        "ngroups": st.sampled_from((1, 2, 8)),
    }
)


@settings(max_examples=200, deadline=None)
@given(sizes)
def test_cuts_cover_time_and_channels(sizes):
    for cut in (config.forward_cut(**sizes), config.backward_cut(**sizes)):
        assert cut.segment % cut.chunk == 0
        assert cut.chunk % cut.config.tile == 0
        assert cut.segment * (cut.segments - 1) < sizes["seqlen"] <= cut.segment * cut.segments
        per_group = cut.blocks // sizes["ngroups"]
        assert cut.blocks == per_group * sizes["ngroups"]
        assert per_group * cut.config.block >= sizes["d_inner"] // sizes["ngroups"]
        assert 1 <= cut.partials <= per_group


def test_batch_one_fills_the_gpu():
    forward = config.forward_cut(**SIZES)
    backward = config.backward_cut(**SIZES)
    assert forward.segments * forward.blocks * forward.config.warps >= 2048
    assert backward.segments * backward.partials * backward.config.warps >= 2048


def test_large_batches_need_no_segments():
    assert config.forward_cut(**{**SIZES, "batch": 32}).segments == 1


def test_partial_sums_stay_near_the_inputs_size():
    # The worst of naive divisions, a partial sum for every block of channels, would be 2.1 GB here.
    sizes = {**SIZES, "d_state": 128}
    cut = config.backward_cut(**sizes)
    partial_bytes = 4 * cut.partials * 2 * 128 * 8192
    assert partial_bytes <= 4 * 2 * 8192 * 2048
    assert partial_bytes < config.workspace_bytes(**sizes, backward=True) < 1e9


@pytest.mark.parametrize(
    ("d_state", "padded"), [(1, 16), (16, 16), (17, 32), (100, 128), (256, 256)]
)
def test_padding(d_state, padded):
    assert config.padded_states(d_state) == padded
    assert config.workspace_bytes(**{**SIZES, "d_state": d_state}, backward=False) > 0


def test_imports_neither_torch_nor_triton():
    code = (
        "import runpy, sys; runpy.run_path(sys.argv[1]); "
        "assert not {'torch', 'triton', 'numba'} & set(sys.modules)"
    )
    folder = Path(config.__file__).parent
    for name in ("triton_config.py", "numba_config.py"):
        subprocess.run([sys.executable, "-c", code, str(folder / name)], check=True)
