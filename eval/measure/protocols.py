"""Protocols of perplexity: which tokens a model reads, and which of them are scored.

The same model and text give perplexities that differ by half and more under different protocols, so a figure goes with
its protocol's name, and figures of two protocols are not compared:

- gptq-N: GPTQ's (arXiv 2210.17323). Documents joined by a blank line, tokenized once, cut into windows of N tokens that
  do not overlap, the tail dropped; every token of a window but the first is scored.
- sliding-N/S: windows of N tokens, each S tokens after the one before; a token is scored once, by the first window that
  reads it, so with at least N - S tokens before it. The text's first token is not scored (and of S = N, no window's).
- llama.cpp-N: the text as the file has it, cut into windows of N tokens; of each, the second half is scored. Where the
  tokenizer starts a text with a special token, that stands in the place of each window's first token.
- word-N: lm-eval's task wikitext. Page by page, wikitext's artefacts undone; every token is scored, the first N after a
  beginning-of-sequence token (and the tokenizer's own, where it puts one: lm-eval scores that too), those after it in
  windows of N. The sum is divided by the number of words that the pages had before anything was undone, so models of
  different vocabularies compare.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NAMES = ("gptq", "sliding", "llama.cpp", "word")
CONTEXTS = {"gptq": 2048, "sliding": 2048, "llama.cpp": 512, "word": 2048}  # what each is known by
_BLANK_LINE = "\n\n"
# A page's title is a line such as " = Robert Boulter = "; with more signs it is a section's.
_TITLE = re.compile(r"^[^\S\n]*= (?!=)[^\n]*(?<!=) =[^\S\n]*$", re.MULTILINE)


@dataclass(frozen=True)
class Window:
    """What a model reads in one go, and what is scored of it.

    ids: int64 [n]. targets: int64 [m], which the logits at first, first + 1, … first + m - 1 predict.
    """

    ids: Tensor
    targets: Tensor
    first: int

    def to(self, device: torch.device) -> "Window":
        return Window(self.ids.to(device), self.targets.to(device), self.first)


@dataclass(frozen=True)
class Plan:
    """name: of the protocol, with its lengths. units: what the sum of losses is divided by, tokens or words."""

    name: str
    windows: list[Window]
    context: int
    units: int
    unit: str = "token"

    @property
    def tokens(self) -> int:
        """Scored tokens."""
        return sum(window.targets.numel() for window in self.windows)

    @property
    def highest(self) -> int:
        """The highest token id."""
        return max(int(max(window.ids.max(), window.targets.max())) for window in self.windows)


def make_plan(
    protocol: str, documents: Sequence[str], tokenizer: Any, context: int, stride: int, limit: int | None
) -> Plan:
    """The windows of a text under a protocol of NAMES.

    Args:
        tokenizer: transformers'.
        context: tokens that the model may read in one go. stride: of the protocol sliding.
        limit: windows, or of the protocol word pages; None for all.
    Raises:
        ValueError: the text fills no window.
    """
    if protocol == "word":
        return _word(documents, tokenizer, context, limit)
    text = (_lines if protocol == "llama.cpp" else _BLANK_LINE.join)(documents)
    ids = _encode(tokenizer, text)
    if protocol == "sliding":
        return _plan(f"sliding-{context}/{stride}", sliding(ids, context, stride), context, limit)
    start = tokenizer.bos_token_id
    start = start if ids.numel() and start is not None and ids[0] == start else None
    make: Callable[[Tensor], list[Window]] = {
        "gptq": lambda ids: halves(ids, context, 0),
        "llama.cpp": lambda ids: halves(ids, context, context // 2, start),
    }[protocol]
    return _plan(f"{protocol}-{context}", make(ids), context, limit)


def _plan(name: str, windows: list[Window], context: int, limit: int | None) -> Plan:
    windows = windows[:limit]
    return Plan(name, windows, context, sum(window.targets.numel() for window in windows))


def _encode(tokenizer: Any, text: str) -> Tensor:
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def _lines(documents: Sequence[str]) -> str:
    """Documents one after the other, each ending its line: the file that a data set of lines was made from."""
    return "".join(document if document.endswith("\n") else f"{document}\n" for document in documents)


def halves(ids: Tensor, context: int, first: int, start: int | None = None) -> list[Window]:
    """Windows [context] that do not overlap, scored after position `first`; the tail is dropped.

    Args:
        start: stands in the place of each window's first token.
    Raises:
        ValueError: there is no window, or nothing is scored in one.
    """
    count = ids.numel() // context
    if not count:
        raise ValueError(f"{ids.numel()} tokens, at least one window of {context} is needed")
    if first + 1 >= context:
        raise ValueError(f"windows of {context} tokens have none to score")
    rows = ids[: count * context].view(count, context).clone()
    if start is not None:
        rows[:, 0] = start
    return [Window(row, row[first + 1 :], first) for row in rows]


def sliding(ids: Tensor, context: int, stride: int) -> list[Window]:
    """Windows of at most `context` tokens, `stride` apart; the last ends with the text.

    Raises:
        ValueError: fewer than two tokens.
    """
    if ids.numel() < 2:
        raise ValueError(f"{ids.numel()} tokens, at least two are needed")
    windows, scored = [], 1  # nothing comes before the first token
    for begin in range(0, ids.numel(), stride):
        row = ids[begin : begin + context]
        end = begin + row.numel()
        scored = max(scored, begin + 1)  # what a window begins with has nothing before it
        if end > scored:
            windows.append(Window(row, ids[scored:end], scored - begin - 1))
            scored = end
        if end == ids.numel():
            break
    return windows


def rolling(ids: Tensor, context: int, prefix: int) -> list[Window]:
    """Windows of at most `context` tokens that score every token once, with as much before it as fits."""
    fed = torch.cat([torch.tensor([prefix]), ids])  # fed[i] comes before ids[i]
    windows = []
    for begin in range(0, ids.numel(), context):
        end = min(begin + context, ids.numel())
        earliest = max(0, end - context)
        windows.append(Window(fed[earliest:end], ids[begin:end], begin - earliest))
    return windows


def _word(documents: Sequence[str], tokenizer: Any, context: int, limit: int | None) -> Plan:
    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if prefix is None:
        raise ValueError("the tokenizer has no token to begin a page with")
    chosen = [page for document in documents for page in pages(document)][:limit]
    windows = [window for page in chosen for window in rolling(_encode(tokenizer, detokenized(page)), context, prefix)]
    if not windows:
        raise ValueError("0 tokens, at least one is needed")
    # The split counts the nothing before a leading space and after a trailing one: so does lm-eval's.
    words = sum(len(re.split(r"\s+", page)) for page in chosen)
    return Plan(f"word-{context}", windows, context, words, "word")


def pages(document: str) -> list[str]:
    """A wikitext file parted before each page's title, as lm-eval's data set is; other documents stay whole."""
    starts = [0, *(found.start() for found in _TITLE.finditer(document))]
    parts = [document[begin:end] for begin, end in zip(starts, [*starts[1:], len(document)])]
    last = len(parts) - 1
    # The line break before a title parts two pages and belongs to neither.
    parts = [part if number == last else part.removesuffix("\n") for number, part in enumerate(parts)]
    return [part for part in parts if part.strip()]


# What lm-eval's task wikitext undoes of wikitext's tokenization, in its order: literal text, then patterns, then text.
_SPACED = (
    ("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
)  # fmt: skip
_PAIRED = (
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"), (r"\[\s*([^\]]*?)\s*\]", r"[\1]"), (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r'"\s*([^"]*?)\s*"', r'"\1"'), (r"'\s*([^']*?)\s*'", r"'\1'"),
)  # fmt: skip
_REST = (
    ("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"),
    (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s"),
)  # fmt: skip


def detokenized(page: str) -> str:
    """A page of wikitext as it may have been before it was cut into words; by the rules of lm-eval's task wikitext."""
    for old, new in _SPACED:
        page = page.replace(old, new)
    for pattern, new in _PAIRED:
        page = re.sub(pattern, new, page)
    for old, new in _REST:
        page = page.replace(old, new)
    return page
