"""Text -> fixed windows of token ids that a method learns from."""

import hashlib
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Calibration:
    """Windows of token ids int64 [windows, context], every one full: there is no padding.

    name: of the text, as reports call it. seed: by which windows were drawn; None where they are the text's first ones.
    """

    name: str
    ids: Tensor
    seed: int | None

    def to_dict(self) -> dict[str, Any]:
        """What a run records of it: where it came from, how much it is, and a hash of the tokens."""
        windows, context = self.ids.shape
        digest = hashlib.sha256(self.ids.contiguous().numpy().tobytes()).hexdigest()
        tokens = windows * context
        return {
            "text": self.name, "windows": windows, "context": context, "tokens": tokens, "seed": self.seed,
            "sha256": digest,
        }  # fmt: skip
