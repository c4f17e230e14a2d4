"""A small kernel repository of a user's: one attention operation."""


def attention(q, k, v):
    """Return causal softmax attention of (B, L, H, P) tensors."""
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return sdpa(q, k, v, is_causal=True).transpose(1, 2)
