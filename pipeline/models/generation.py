"""A model writes: which tokens are taken, how fast they came, and an end where it only repeats itself."""

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

from ..errors import ConfigError, NumericsError
from ..system.printable import printable

Write = Callable[[str], None]

# A loop of greedy decoding: this often and this long. Tables, rulers of dashes and lists of zeros are shorter.
_TIMES, _TOKENS, _LONGEST = 4, 64, 64  # repeats; tokens of all repeats together; tokens of one
_EVERY = 8  # tokens between two looks


@dataclass(frozen=True)
class Sampling:
    """Which token follows.

    Attributes:
        temperature: 0 always takes the most probable token; None leaves it to the checkpoint's generation config.
        top_p: draws from the fewest tokens whose probabilities sum up to this.
        seed: of the draws; None for another one each time.
    Raises:
        ConfigError: a seed or top_p, and nothing is drawn.
    """

    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for option, value in (("--top-p", self.top_p), ("--seed", self.seed)):
            if self.temperature == 0 and value is not None:
                raise ConfigError(
                    f"{option} {value}: at temperature 0 nothing is drawn; give --temperature as well, such as 0.7"
                )

    def options(self) -> dict[str, Any]:
        """What transformers' generate takes for it."""
        if self.temperature == 0:
            return {"do_sample": False}
        chosen = {"temperature": self.temperature, "top_p": self.top_p}
        named = {name: value for name, value in chosen.items() if value is not None}
        return {"do_sample": True, **named} if named else {}

    def draws(self, model: PreTrainedModel) -> bool:
        """Whether tokens are drawn by chance."""
        return bool({"do_sample": getattr(model.generation_config, "do_sample", False), **self.options()}["do_sample"])

    @contextlib.contextmanager
    def random(self, device: torch.device, more: int = 0) -> Iterator[int]:
        """While it lasts, torch draws by the seed, which it hands over; afterwards as if nothing had been drawn.

        Args:
            device: where tokens are drawn.
            more: is added to the seed, so that each answer of a conversation has its own.
        """
        seed = secrets.randbelow(1 << 31) if self.seed is None else self.seed
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed + more)
            yield seed


class Printer(TextStreamer):
    """Hands over words as they are generated, without characters that could steer a terminal; and counts tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Write, skip_prompt: bool = True):
        super().__init__(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
        self.write, self.words = write, ""
        self.tokens = -1  # the prompt comes first
        self.start = self.first = self.last = time.perf_counter()

    def put(self, value: Tensor) -> None:
        self.tokens += 1
        self.last = time.perf_counter()
        if self.tokens == 1:
            self.first = self.last
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.words += text
        self.write(printable(text, visible=False))

    def speed(self) -> str:
        """How many tokens came and how fast, the first one apart: it waits until the prompt is read."""
        if self.tokens < 1:
            return "no tokens"
        count = f"{self.tokens} token{'' if self.tokens == 1 else 's'}"
        first = f"the first after {self.first - self.start:.2f} s"
        if self.tokens == 1 or self.last == self.first:
            return f"{count}, {first}"
        return f"{count}, {(self.tokens - 1) / (self.last - self.first):.1f} per second, {first}"


class FiniteLogits(LogitsProcessor):
    """Stops a model that no longer computes: the token that follows would be nobody's choice.

    reads_largest_alone: the largest score of each row, [batch, 1], serves as well as all of them.
    """

    reads_largest_alone = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores [batch, vocabulary] as they are. Minus infinity is no fault: it rules a token out.

        Raises:
            NumericsError: NaN, plus infinity, or nothing but minus infinity.
        """
        if not bool(scores.amax(-1).isfinite().all()):  # the maximum of a row with NaN is NaN
            raise NumericsError(
                f"after {input_ids.shape[1]} tokens the model gives {scores.amax(-1).max().item()} as its largest "
                "logit, expected a finite number: its weights or its dtype do not hold this text; `bitpress doctor` "
                "looks at the weights"
            )
        return scores


class Repetition(StoppingCriteria):
    """Stops a text whose end is one phrase again and again. Greedy decoding hardly ever leaves such a loop.

    Args:
        prompt: the number of tokens before the generated ones.
    """

    def __init__(self, prompt: int):
        self.prompt, self.reason = prompt, ""

    def __call__(self, input_ids: Tensor, scores: Any, **more: Any) -> Any:
        generated = input_ids.shape[1] - self.prompt
        if generated >= _TOKENS and generated % _EVERY == 0:
            tail = input_ids[0, -min(generated, _TIMES * _LONGEST) :].tolist()
            self.reason = repetition(tail)
        return torch.full((len(input_ids),), bool(self.reason), device=input_ids.device)


def repetition(tokens: list[int]) -> str:
    """What repeats at the end of these tokens, in words; "" for nothing that is long enough."""
    for period in range(1, _LONGEST + 1):
        length = max(_TOKENS, _TIMES * period)
        tail = tokens[-length:]
        if len(tail) == length and tail[period:] == tail[:-period]:
            what = "the same token" if period == 1 else f"the same {period} tokens"
            return (
                f"stopped: {what} came {length // period} times in a row, and the most probable token would go on so; "
                "--temperature 0.7 draws others"
            )
    return ""


def generate(
    model: PreTrainedModel,
    ids: Tensor,
    tokens: int,
    sampling: Sampling,
    printer: Printer,
    more: int = 0,
    **options: Any,
) -> tuple[Any, str]:
    """What transformers' generate returns for a prompt of ids int64 [1, n], and a sentence on how it went.

    Args:
        tokens: at most so many. printer: gets them as they come. more: see Sampling.random.
        options: further ones of transformers' generate.
    Raises:
        NumericsError: logits that are not finite.
    """
    loop = Repetition(ids.shape[1])
    drawn = sampling.draws(model)
    with sampling.random(ids.device, more) as seed:
        output = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, streamer=printer,
            logits_processor=LogitsProcessorList([FiniteLogits()]),
            stopping_criteria=StoppingCriteriaList([] if drawn else [loop]), **sampling.options(), **options,
        )  # fmt: skip
    said = [printer.speed(), *([f"seed {seed}"] if drawn else []), *([loop.reason] if loop.reason else [])]
    return output, "; ".join(said)
