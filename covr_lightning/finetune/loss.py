"""The fine-tuning loss of Eq. 6."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


def next_token_targets(labels: Tensor) -> Tensor:
    """What each position must predict: labels (B, T) shifted left by one, the last position ignored."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def weighted_nll(logits: Tensor, targets: Tensor, weights: Tensor, label_smoothing: float = 0.1) -> Tensor:
    """Σ_i w_i·NLL_i over label tokens, not yet divided by N_v.

    Args:
        logits: (M, V), one row per label token.
        targets: (M,) token ids.
        weights: (M,), the weight of the row that each token belongs to.
        label_smoothing: Share ε of the target spread over the vocabulary: (1−ε)·(−log p_y) + ε·mean_v(−log p_v).

    Returns:
        Scalar.
    """
    nll = F.cross_entropy(logits.float(), targets, reduction="none", label_smoothing=label_smoothing)
    return (weights * nll).sum()


def ralw_loss(logits: Tensor, labels: Tensor, weights: Tensor, label_smoothing: float = 0.1) -> Tensor:
    """Return-weighted negative log-likelihood (Eq. 6): (1/N_v) Σ_b w_b Σ_t −log p(y_{b,t} | x_{b,<t}).

    N_v counts every label token of the batch, those of rows with weight 0 as well.

    Args:
        logits: (B, T, V), as a language model returns them.
        labels: (B, T) token ids, −100 where nothing is learnt; shifted here.
        weights: (B,) ≥ 0.
        label_smoothing: See :func:`weighted_nll`.

    Returns:
        Scalar; 0 for a batch without labels.
    """
    targets = next_token_targets(labels)
    mask = targets != IGNORED
    rows = weights.to(logits.device)[:, None].expand_as(targets)
    return weighted_nll(logits[mask], targets[mask], rows[mask], label_smoothing) / mask.sum().clamp(min=1)
