"""Turns text into token ids, and checks them."""

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ..errors import CheckpointError
from .text import Text


def encode(tokenizer: Any, text: Text) -> Tensor:
    """Token ids int64 [n]; the whole text is tokenized at once."""
    return torch.tensor(tokenizer(text.content, verbose=False)["input_ids"], dtype=torch.int64)


def longest(model: PretrainedConfig, context: int) -> int:
    """`context`, cut to the positions that the model has; its config may call them n_positions, say."""
    limit = getattr(model.get_text_config(), "max_position_embeddings", None)
    return min(context, limit) if isinstance(limit, int) and limit > 0 else context


def check_ids(name: str, highest: int, tokenizer: Any, model: PretrainedConfig) -> None:
    """Refuse a token that the model does not have.

    Raises:
        CheckpointError: names the token.
    """
    vocabulary = model.get_text_config().vocab_size
    if highest >= vocabulary:
        raise CheckpointError(
            f"{name}: the tokenizer gives token {highest} ({tokenizer.convert_ids_to_tokens(highest)!r}), the model "
            f"has {vocabulary}; one of them is another model's: mend the checkpoint, or give text without that token"
        )
