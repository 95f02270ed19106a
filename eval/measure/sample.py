"""A sample of what a model writes: one greedy continuation, which shows a broken model at a glance."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

SAMPLE_TOKENS = 48


@contextlib.contextmanager
def greedy(model: Any) -> Iterator[None]:
    """While it lasts, the model takes the most probable token, whatever its generation config asks for.

    Only that one's ids of tokens that end or fill a text count.
    """
    own = model.generation_config
    ids = {key: getattr(own, key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = type(own)(**ids)
    try:
        yield
    finally:
        model.generation_config = own


def prompt_ids(model: Any, tokenizer: Any, prompt: str) -> Tensor:
    """Token ids int64 [1, n] of a prompt; an empty one is the token that begins a text, or the one that ends it.

    Raises:
        ValueError: the prompt is empty, and neither the tokenizer nor the model has such a token.
    """
    if ids := tokenizer(prompt)["input_ids"]:
        return torch.tensor([ids], device=model.device)
    ends = model.generation_config.eos_token_id
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])):
        if token is not None:
            return torch.tensor([[token]], device=model.device)
    raise ValueError("the prompt is empty, and the tokenizer has no token that begins or ends a text; give a prompt")


@torch.inference_mode()
def sample(model: Any, tokenizer: Any, prompt: str) -> str:
    """The prompt and SAMPLE_TOKENS greedy tokens after it, decoded.

    Raises:
        ValueError: see prompt_ids.
    """
    ids = prompt_ids(model, tokenizer, prompt)
    with greedy(model):
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=SAMPLE_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
    return tokenizer.decode(output[0], skip_special_tokens=True)
