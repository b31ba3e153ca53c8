"""What an adapter has learnt to use: expert diversity and routing.

Imports `functional`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from . import functional


def expert_similarity(pools: Iterable[Tensor]) -> float:
    """Mean |cosine| between the experts of a pool, averaged over the pools.

    Args:
        pools: (e, r, o) each, as in `LilyBank.B`.

    Returns:
        1 if the experts are copies of one another and the pool is really one B; 0 if they are orthogonal. NaN for
        pools of one expert.
    """
    similarities = [functional.pairwise_similarity(B) for B in pools if len(B) > 1]
    return torch.stack(similarities).mean().item() if similarities else float("nan")


def routing_entropy(routing: Mapping[int, Tensor]) -> float:
    """Mean entropy of recorded routing weights, as a fraction of its maximum.

    Args:
        routing: slot -> S (b or 1, e), from `LilyBank.record_routing`.

    Returns:
        1 if every slot mixes all experts equally, 0 if each uses one. NaN for pools of one expert.
    """
    weights = list(routing.values())
    if not weights or weights[0].shape[-1] < 2:
        return float("nan")
    return torch.cat([functional.entropy(S) for S in weights]).mean().item()
