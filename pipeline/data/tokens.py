"""Turns text into token ids, and checks them."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..system.limits import Budget, ChildError, OverBudget, in_child
from .text import Text

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Fast tokenizers take a second and some hundred bytes of memory for each byte of a large text, those in Python ten.
_SECONDS, _SECONDS_PER_BYTE = 20, 1e-4
_BYTES, _BYTES_PER_BYTE = 1 << 30, 2000


def bounded(what: str, size: int, function: Callable[[], Any]) -> Any:
    """What a tokenizer or its template makes of a text, which JSON can hold; computed in a child process with limits.

    Patterns and templates come from the checkpoint, and some would take for ever.

    Args:
        what: begins the error's sentence. size: the characters of the text.
    Raises:
        CheckpointError: it fails, or takes more than such a text may take. BitpressError: the function raised it.
    """
    try:
        return in_child(function, Budget(_SECONDS + _SECONDS_PER_BYTE * size, _BYTES + _BYTES_PER_BYTE * size))
    except OverBudget as error:
        raise CheckpointError(f"{what} takes {error} for {size} characters; mend the tokenizer's files") from error
    except ChildError as error:
        reason = next(iter(str(error).splitlines()), "")
        raise CheckpointError(f"{what} fails: {reason}") from error


class BoundedTokenizer:
    """A tokenizer of transformers whose text is tokenized by `bounded`. All else is the tokenizer's own."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        """{"input_ids": ids}"""
        tokenize = lambda: self.tokenizer(text, **{"verbose": False, **options})["input_ids"]  # noqa: E731
        return {"input_ids": bounded("the tokenizer", len(text), tokenize)}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def encode(tokenizer: Any, text: Text) -> Tensor:
    """Token ids int64 [n]; the whole text is tokenized at once.

    Raises:
        CheckpointError: the tokenizer fails, or takes too long.
    """
    return torch.tensor(BoundedTokenizer(tokenizer)(text.content)["input_ids"], dtype=torch.int64)


def longest(model: "PretrainedConfig", context: int) -> int:
    """`context`, cut to the positions that the model has; its config may call them n_positions, say."""
    limit = getattr(model.get_text_config(), "max_position_embeddings", None)
    return min(context, limit) if isinstance(limit, int) and limit > 0 else context


def check_ids(name: str, highest: int, tokenizer: Any, model: "PretrainedConfig") -> None:
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
