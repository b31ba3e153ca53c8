"""What an adapter has learnt to use: expert diversity and routing.

Imports `functional` and `bank`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from . import functional
from .bank import LilyBank


def expert_similarity(bank: LilyBank) -> float:
    """Mean |cosine| between the experts of a pool, averaged over the pools.

    1 says that the experts are copies of one another and the pool is really one B; 0 that they are
    orthogonal. NaN for a pool of one expert.
    """
    if bank.config.num_B < 2:
        return float("nan")
    return torch.stack([functional.pairwise_similarity(B) for B in bank.B]).mean().item()


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
