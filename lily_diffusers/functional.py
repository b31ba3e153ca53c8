"""The mathematics of Lily: pure functions on tensors.

Everything a Lily layer computes is here, once. The functions serve several *slots* at a time (the
projections that read the same input, such as q, k and v of self-attention), so every tensor that
belongs to a slot has a leading axis `s`; a single slot has s = 1.

Axes: s slots, b batch, n tokens, i input features, o output features, r rank, e experts.
This module imports torch only.

Source: Zhong et al., "Low-Rank Interconnected Adaptation across Layers", arXiv 2407.09946, Eq. 1-4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def stack_slots(tensors: Sequence[Tensor]) -> Tensor:
    """Stack one tensor per slot along a new leading axis; a single tensor, shared by all, is not copied.

    Args:
        tensors: one per slot, all of the same shape, or one for all slots.

    Returns:
        (s, ...), or (1, ...), which broadcasts.
    """
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def project_down(x: Tensor, A: Sequence[Tensor]) -> Tensor:
    """Apply the down-projections of all slots that read `x` in one matmul: h = x Aᵀ.

    Args:
        x: (b, n, i), any float dtype.
        A: one (r, i) per slot, or one for all slots.

    Returns:
        h: (s, b, n, r), or (1, b, n, r), which broadcasts; a view of one matmul's result.

    Source: Eq. 1.
    """
    if len(A) == 1:
        return F.linear(x, A[0]).unsqueeze(0)
    h = F.linear(x, torch.cat(list(A)))  # (b, n, s·r)
    return h.unflatten(-1, (len(A), -1)).permute(2, 0, 1, 3)  # (s, b, n, r)


def router_logits(h: Tensor, R: Tensor, rho: Tensor | None = None) -> Tensor:
    """Score every expert for every token: h Rᵀ + ρ.

    Args:
        h: (s, b, n, r).
        R: (s, e, r) or (1, e, r).
        rho: (s, e) or (1, e) or None.

    Returns:
        (s, b, n, e).
    """
    s, b, n, r = h.shape
    logits = torch.bmm(h.reshape(s, b * n, r), R.transpose(1, 2).expand(s, -1, -1)).unflatten(1, (b, n))
    return logits if rho is None else logits + rho[:, None, None, :]


def route_token(h: Tensor, R: Tensor, rho: Tensor | None = None) -> Tensor:
    """Mean over the tokens of softmax(h Rᵀ + ρ), each sample on its own.

    Args:
        h: (s, b, n, r).
        R: (s, e, r) or (1, e, r).
        rho: (s, e) or (1, e) or None.

    Returns:
        S: (s, b, e), float32, rows sum to 1.

    Source: the reference code's routing, without its mean over the batch.
    """
    return torch.softmax(router_logits(h, R, rho), dim=-1, dtype=torch.float32).mean(dim=2)


def route_sequence(h: Tensor, R: Tensor, rho: Tensor | None = None) -> Tensor:
    """softmax(Σ_n h Rᵀ + ρ), each sample on its own.

    The sum over the tokens commutes with R, so it is taken first, in float32. ρ is added once, not
    once per token: an initial preference then means the same at every resolution.

    Args:
        h: (s, b, n, r).
        R: (s, e, r) or (1, e, r).
        rho: (s, e) or (1, e) or None.

    Returns:
        S: (s, b, e), float32, rows sum to 1.

    Source: Eq. 2.
    """
    with torch.autocast(h.device.type, enabled=False):
        logits = router_logits(h.sum(dim=2, keepdim=True, dtype=torch.float32), R.float())  # (s, b, 1, e)
        logits = logits.squeeze(2)
        return torch.softmax(logits if rho is None else logits + rho.float().unsqueeze(1), dim=-1)


def route_batch(h: Tensor, R: Tensor, rho: Tensor | None = None) -> Tensor:
    """Mean over the tokens *and the batch* of softmax(h Rᵀ + ρ): the images of a batch change each other.

    Args:
        h: (s, b, n, r).
        R: (s, e, r) or (1, e, r).
        rho: (s, e) or (1, e) or None.

    Returns:
        S: (s, 1, e), float32, rows sum to 1.

    Source: the reference code and PEFT's `tuners/lily`.
    """
    return route_token(h, R, rho).mean(dim=1, keepdim=True)


def route_static(rho: Tensor) -> Tensor:
    """softmax(ρ): learned weights that no input changes.

    Args:
        rho: (s, e).

    Returns:
        S: (s, 1, e), float32, rows sum to 1.

    Source: PEFT issue 2563.
    """
    return torch.softmax(rho, dim=-1, dtype=torch.float32).unsqueeze(1)


def mix_experts(S: Tensor, B: Tensor) -> Tensor:
    """Mix the experts into one up-projection per slot and sample: M = Σ_e S_e B_e.

    Args:
        S: (s, b, e), or (1, b, e) where the slots share their weights; it is cast to B's dtype.
        B: (s, e, r, o), or (1, e, r, o) where the slots share a pool.

    Returns:
        M: (s, b, r, o); (1, b, r, o) if the slots share both.

    Source: Eq. 3 (experts first, then one multiplication: appendix A.2).
    """
    S = S.to(B.dtype)
    if B.shape[0] == 1:  # one plain matmul: broadcasting would copy the pool once per slot
        return torch.matmul(S, B[0].flatten(1)).unflatten(-1, B.shape[2:])
    return torch.bmm(S.expand(B.shape[0], -1, -1), B.flatten(2)).unflatten(-1, B.shape[2:])


def add_delta_(base: Tensor, h: Tensor, M: Tensor) -> Tensor:
    """Add a slot's update to its base projection, in place: y = base + h M.

    In place saves a pass over the widest tensor; a frozen projection's output is needed by nothing else,
    its own backward included.

    Args:
        base: (b, n, o), the frozen projection's output, contiguous; overwritten.
        h: (b, n, r).
        M: (b, r, o), or (1, r, o) if all samples share one mix. Any scale is already in M.

    Returns:
        y: `base`.

    Source: Eq. 4.
    """
    h, M = h.to(base.dtype), M.to(base.dtype)
    if M.shape[0] == 1 and base.shape[0] > 1:
        base.flatten(0, 1).addmm_(h.flatten(0, 1), M[0])
        return base
    return base.baddbmm_(h, M)


def pairwise_similarity(B: Tensor) -> Tensor:
    """Mean |cosine| between the experts of one pool: 1 says they are copies, 0 that they are orthogonal.

    Args:
        B: (e, r, o), e ≥ 2.

    Returns:
        A float32 scalar; experts that are all zero have similarity 0.
    """
    unit = F.normalize(B.detach().float().flatten(1), dim=-1)
    cosine = (unit @ unit.T).abs()
    e = len(B)
    return (cosine.sum() - cosine.diagonal().sum()) / (e * (e - 1))


def entropy(S: Tensor) -> Tensor:
    """Entropy of routing weights, in units of its maximum: 1 is uniform, 0 is one expert alone.

    Args:
        S: (..., e), rows sum to 1, e ≥ 2.

    Returns:
        (...), float32.
    """
    S = S.detach().float()
    return -torch.special.xlogy(S, S).sum(-1) / torch.log(torch.tensor(float(S.shape[-1])))
