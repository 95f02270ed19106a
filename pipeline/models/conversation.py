"""A conversation with a model through its chat template. What the model has read already is not read again."""

from collections.abc import Iterator
from itertools import takewhile
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from bitpress.eval.measure.cache import cache_name, cache_of

from ..data.tokens import bounded, check_ids
from ..errors import BitpressError, CheckpointError, ConfigError
from ..system.printable import printable
from .generation import Printer, Sampling, Write, generate

HELP = "/clear begins anew, /exit ends; Ctrl-C stops an answer"


class Conversation:
    """The turns so far, and the key-value cache of the tokens that were read.

    Args:
        system: instructions for the model, before the first turn; None for none.
        tokens: the longest answer.
        sampling: which token follows; by default as the checkpoint's generation config says.
    Raises:
        ConfigError: the tokenizer has no chat template. CheckpointError: the template refuses the instructions.
    """

    turns: list[dict[str, str]]
    cache: Any
    read: list[int]

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        system: str | None = None,
        tokens: int = 1024,
        sampling: Sampling = Sampling(),  # noqa: B008 (it is frozen)
    ):
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                "this model's tokenizer has no chat template; use `bitpress generate`, or its chat version"
            )
        self.model, self.tokenizer, self.tokens = model, tokenizer, tokens
        self.sampling = sampling
        self.system = [{"role": "system", "content": system}] if system else []
        self.clear()
        if system:  # some templates take none, and no turn could be answered then
            try:
                self._encode([{"role": "user", "content": "Hello"}])
            except CheckpointError as error:
                raise CheckpointError(
                    f"the instructions (--system) cannot be given: {error}; leave them out"
                ) from error

    def clear(self) -> None:
        """Forget every turn."""
        self.turns = []
        self._forget_cache()

    def answer(self, text: str, write: Write) -> str:
        """Answer one turn of the user, handing over the words as they are generated.

        Ctrl-C ends the answer; the words until then stay part of the conversation.

        Returns:
            A sentence on how it went: how many tokens came, how fast, and what else ended them than the model.
        Raises:
            ConfigError: the context is full. CheckpointError: the checkpoint's chat template fails.
        """
        turns = [*self.turns, {"role": "user", "content": text}]
        ids = self._encode(turns).to(self.model.device)
        room = getattr(self.model.config.get_text_config(), "max_position_embeddings", 1 << 30) - ids.shape[1]
        if room < 1:
            raise ConfigError(
                f"the conversation is {ids.shape[1]} tokens long, more than the model's context; /clear it"
            )
        printer = Printer(self.tokenizer, write)
        try:
            output, said = generate(
                self.model, ids, min(self.tokens, room), self.sampling, printer, len(self.turns),
                num_beams=1, return_dict_in_generate=True, pad_token_id=self.tokenizer.eos_token_id,
                **{cache_name(self.model) or "past_key_values": self._usable_cache(ids)},
            )  # fmt: skip
            self.cache, self.read = cache_of(output), output.sequences[0, :-1].tolist()  # the last was not read
        except KeyboardInterrupt:
            self._forget_cache()  # some layers may have read a token more than others
            said = f"{printer.speed()}; interrupted"
        self.turns = [*turns, {"role": "assistant", "content": printer.words}]
        return said

    def _encode(self, turns: list[dict[str, str]]) -> torch.Tensor:
        """The conversation as the model reads it, int64 [1, n].

        Raises:
            CheckpointError: the checkpoint's chat template fails.
        """
        turns = [*self.system, *turns]
        ids = bounded(
            "the model's chat template", sum(len(turn["content"]) for turn in turns), lambda: self._ids(turns)
        )
        check_ids("the conversation", max(ids, default=0), self.tokenizer, self.model.config)
        return torch.tensor([ids], dtype=torch.int64)

    def _ids(self, turns: list[dict[str, str]]) -> list[int]:
        encoded: Any = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
        return encoded["input_ids"]

    def _usable_cache(self, ids: torch.Tensor) -> DynamicCache | None:
        """The cache, cut to the tokens that `ids` [1, n] and the tokens read so far begin with; None if useless."""
        pairs = zip(self.read, ids[0, :-1].tolist())
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if type(self.cache) is not DynamicCache or not common:
            return None
        try:
            if common < len(self.read):
                self.cache.crop(common - len(self.read))
        except (ValueError, RuntimeError):  # sliding windows no longer hold the tokens to go back to
            return None
        return self.cache

    def _forget_cache(self) -> None:
        self.cache, self.read = None, []


def converse(
    conversation: Conversation, lines: Iterator[str], write: Write, say: Write = lambda sentence: None
) -> None:
    """Answer line after line, until /exit or the last one. A line that cannot be answered is followed by the reason.

    Args:
        write: takes the words of answers. say: takes a sentence on how each answer went.
    """
    for line in map(str.strip, lines):
        if line == "/exit":
            return
        if line == "/clear":
            conversation.clear()
        elif line.startswith("/"):
            write(f"{HELP}\n")
        elif line:
            said = ""
            try:
                said = conversation.answer(line, write)
            except BitpressError as error:  # the template refuses this line, say: the next may be answered
                write(printable(str(error)))
            write("\n")
            if said:
                say(said)
