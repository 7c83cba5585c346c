"""A regression-like loss on numbers' tokens, which have a distance that cross-entropy does not see.

To it 0.11 is as wrong as -0.90 where the label is 0.10.
"""

from __future__ import annotations

import torch
from torch import Tensor

from covr_lightning.vlm.action_text import DECIMALS, ActionText
from covr_lightning.vlm.inputs import VLMInputs

#: Most values between the bounds whose texts are looked through for tokens.
MAX_VALUES = 10_001


class NumberTokens:
    """The tokens of actions' texts that are numbers themselves, e.g. ten digits, or whole values of two decimals.

    Attributes:
        ids: (N,), ascending.
        values: (N,) float32, what each one says read alone.
    """

    def __init__(self, inputs: VLMInputs, codec: ActionText) -> None:
        """Look through the texts of values from the lower to the upper bounds.

        Args:
            inputs: Tokenises as in training.
            codec: The answer's format.
        """
        span = float((codec.high - codec.low).max()) * 10**DECIMALS
        actions = codec.along_bounds(min(MAX_VALUES, round(span) + 1))
        found = {token for action in actions for token in inputs.answer_ids(codec.encode(action))}
        read = {token: _number(inputs.tokenizer.decode([token])) for token in found}
        numbers = {token: value for token, value in sorted(read.items()) if value is not None}
        self.ids = torch.tensor([*numbers], dtype=torch.long)
        self.values = torch.tensor([*numbers.values()])

    def expected_distance(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Σ_j p_j·|v_j − v_y|, p being the softmax over number tokens only; 0 where the target is no number.

        NTL-WAS of Zausinger et al., "Regress, Don't Guess" (ICML 2025): the Wasserstein-1 distance to the label, in the
        unit of the tokens' own values, so of digits 0 to 9 whatever their place in the number.

        Args:
            logits: (M, V), one row per label token.
            targets: (M,) token ids.

        Returns:
            (M,) float32.
        """
        ids, values = self.ids.to(logits.device), self.values.to(logits.device)
        is_target = targets[:, None] == ids  # (M, N)
        true = (is_target * values).sum(-1, keepdim=True)
        probabilities = logits[:, ids].float().softmax(-1)
        return (probabilities * (values - true).abs()).sum(-1) * is_target.any(-1)


def _number(text: str) -> float | None:
    """What a token's text says, if it is a plain decimal number."""
    text = text.strip()
    return float(text) if text.removeprefix("-").replace(".", "", 1).isdecimal() else None
