import math

from mambench.kernels.ssd.torch_config import KEEP, LARGEST_CHUNK, workspace_bytes


def test_workspace_counts_kept_states_only_for_gradients():
    sizes = {"batch": 1, "seqlen": 1 << 16, "nheads": 4, "headdim": 64, "d_state": 128}
    forward = workspace_bytes(**sizes, itemsize=4, needs_grad=False)
    training = workspace_bytes(**sizes, itemsize=4, needs_grad=True)
    states = 4 * 4 * 64 * 128 * math.ceil(sizes["seqlen"] / (LARGEST_CHUNK * KEEP))
    assert states < training - forward < 2 * states
