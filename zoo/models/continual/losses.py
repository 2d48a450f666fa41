"""Losses that learners of a sequence of tasks share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["replay_weight", "supervised_contrastive"]


def supervised_contrastive(z: Tensor, labels: Tensor, temperature: float = 0.5, *, reduce: bool = True) -> Tensor:
    """Supervised contrastive loss, the form with the sum outside the logarithm (Khosla et al., 2020, eq. 2).

    Args:
        z: Representations (B, d), normalised here.
        labels: (B,).
        temperature: Of the soft-max.
        reduce: Mean over the anchors that have a positive, 0 if none has; else each anchor's loss (B,), NaN where
            there is no positive.
    """
    u = F.normalize(z, dim=-1)
    similarity = u @ u.mT / temperature
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    log_p = similarity - similarity.masked_fill(itself, -torch.inf).logsumexp(-1, keepdim=True)
    positive = (labels.unsqueeze(0) == labels.unsqueeze(1)) & ~itself
    count = positive.sum(-1)
    anchors = -log_p.masked_fill(~positive, 0).sum(-1) / count.clamp_min(1)
    if not reduce:
        return anchors.masked_fill(count == 0, torch.nan)
    return (anchors * (count > 0)).sum() / (count > 0).sum().clamp_min(1)


def replay_weight(task: int) -> float:
    """Weight of the current task's loss against the replayed one's: 1 / t for the t-th task, `task` from 0."""
    return 1 / (task + 1)
