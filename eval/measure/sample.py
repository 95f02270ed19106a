"""A sample of what a model writes: one greedy continuation, which shows a broken model at a glance."""

from typing import Any

import torch

SAMPLE_TOKENS = 48


@torch.inference_mode()
def sample(model: Any, tokenizer: Any, prompt: str) -> str:
    """The prompt and SAMPLE_TOKENS greedy tokens after it, decoded."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=model.device)
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=SAMPLE_TOKENS, do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return tokenizer.decode(output[0], skip_special_tokens=True)
