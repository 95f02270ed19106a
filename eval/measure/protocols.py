"""Protocols of perplexity: which tokens a model reads, and which of them are scored.

Under different protocols the same model and text give perplexities that differ by half and more. So a figure always
carries its protocol's name, and figures of two protocols are not compared:

- gptq-N: GPTQ's (arXiv 2210.17323). Documents joined by a blank line, tokenized once, cut into windows of N tokens that
  do not overlap, the tail dropped; every token of a window but the first is scored.
- sliding-N/S: windows of N tokens, each S tokens after the one before. A token is scored once, by the first window that
  reads it, so it has at least N - S tokens before it. The text's first token is not scored (with S = N, the first token
  of no window is).
- gptq-N+bos, sliding-N/S+bos: the same where the tokenizer begins a text with special tokens (BOS). Each window begins
  with them, as each text of the model's training did, and holds so many tokens less of the text; all of these are
  scored. Gemma predicts nothing sensible without them. Published figures of Llama mostly have them in the first window
  only: `bos: first` measures so, under the name without +bos. `bos: every` puts the tokenizer's BOS in front although
  the tokenizer does not.
- llama.cpp-N: the text as it is in the file, cut into windows of N tokens; the second half of each is scored. Where the
  tokenizer starts a text with a special token, that token replaces the first one of each window.
- word-N: lm-eval's task wikitext. It reads page by page, and undoes wikitext's artefacts. Every token is scored: the
  first N after a beginning-of-sequence token (lm-eval also scores the one that the tokenizer adds), the others in
  windows of N. The sum is divided by the number of words of the original pages, so models with different vocabularies
  compare.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CONTEXTS = {"gptq": 2048, "sliding": 2048, "llama.cpp": 512, "word": 2048}  # name -> the usual length of a window
_BLANK_LINE = "\n\n"
# A page's title is a line such as " = Robert Boulter = "; a section's title has more signs.
_TITLE = re.compile(r"^[^\S\n]*= (?!=)[^\n]*(?<!=) =[^\S\n]*$", re.MULTILINE)


@dataclass(frozen=True)
class Window:
    """Tokens that a model reads in one go, and those of them that are scored.

    ids: int64 [n], the tokens. targets: int64 [m], the scored tokens, which the logits at the positions first,
    first + 1, … first + m - 1 predict.
    """

    ids: Tensor
    targets: Tensor
    first: int

    def to(self, device: torch.device) -> "Window":
        return Window(self.ids.to(device), self.targets.to(device), self.first)


@dataclass(frozen=True)
class EvaluationWindows:
    """All windows of a text, under one protocol.

    name: the protocol's name with its lengths. units: the number of tokens or words by which the sum of losses is
    divided. unit: "token" or "word". bos: what begins with the tokens that the tokenizer puts before a text, such as
    "each window"; None where it puts none.
    """

    name: str
    windows: list[Window]
    context: int
    units: int
    unit: str = "token"
    bos: str | None = None

    @property
    def tokens(self) -> int:
        """The number of scored tokens."""
        return sum(window.targets.numel() for window in self.windows)

    @property
    def highest(self) -> int:
        """The highest token id."""
        return max(int(max(window.ids.max(), window.targets.max())) for window in self.windows)


def evaluation_windows(
    protocol: str,
    documents: Sequence[str],
    tokenizer: Any,
    context: int,
    stride: int,
    limit: int | None,
    bos: str = "auto",
) -> EvaluationWindows:
    """The windows of a text under one protocol of CONTEXTS.

    Args:
        tokenizer: transformers'.
        context: tokens of one window. stride: tokens between two windows, for the protocol sliding.
        limit: the most windows, or for the protocol word the most pages; None for all.
        bos: which windows of the protocols gptq and sliding begin with BOS: "auto" for each where the tokenizer begins
            a text so, "first" for the first one alone, "every" for each whatever the tokenizer, which has one, does.
    Raises:
        ValueError: the text fills no window.
    """
    if protocol == "word":
        return _word(documents, tokenizer, context, limit)
    text = (_lines if protocol == "llama.cpp" else _BLANK_LINE.join)(documents)
    ids = _encode(tokenizer, text)
    name, begins = f"{protocol}-{context}", beginning(tokenizer, ids)
    if protocol == "llama.cpp":
        start = tokenizer.bos_token_id
        start = start if ids.numel() and start is not None and ids[0] == start else None
        windows, what = halves(ids, context, context // 2, start), None if start is None else "each window"
        return _limited(name, windows, context, limit, what)
    name = f"{name}/{stride}" if protocol == "sliding" else name
    start = begins if bos == "auto" else ids[:0]
    body = ids[begins.numel() :]
    if bos == "every":
        start = begins if begins.numel() else torch.tensor([tokenizer.bos_token_id])
    if not start.numel():
        windows = sliding(ids, context, stride) if protocol == "sliding" else halves(ids, context, 0)
        return _limited(name, windows, context, limit, "the first window alone" if begins.numel() else None)
    room = context - start.numel()
    if room < 1:
        raise ValueError(f"windows of {context} tokens have no room for text after {start.numel()} that begin it")
    step = min(stride, room) if protocol == "sliding" else room
    windows = after(start, body, room, step, tail=protocol == "sliding")
    return _limited(f"{name}+bos", windows, context, limit, "each window")


def _limited(name: str, windows: list[Window], context: int, limit: int | None, bos: str | None) -> EvaluationWindows:
    windows = windows[:limit]
    return EvaluationWindows(name, windows, context, sum(window.targets.numel() for window in windows), bos=bos)


def _encode(tokenizer: Any, text: str) -> Tensor:
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def beginning(tokenizer: Any, ids: Tensor) -> Tensor:
    """The special tokens, int64 [n], that a tokenizer put before the text of `ids`: BOS, or two of GLM's, or none."""
    added = _encode(tokenizer, "")[: ids.numel()]  # those that it puts after a text, too
    same = (added == ids[: added.numel()]).long().cumprod(0)
    return added[: int(same.sum())]


def _lines(documents: Sequence[str]) -> str:
    """The documents one after the other, each with a line end: the text file behind a data set of lines."""
    return "".join(document if document.endswith("\n") else f"{document}\n" for document in documents)


def halves(ids: Tensor, context: int, first: int, start: int | None = None) -> list[Window]:
    """Windows [context] that do not overlap, scored after position `first`; the tail is dropped.

    Args:
        start: a token that replaces the first one of each window.
    Raises:
        ValueError: the tokens fill no window, or a window scores nothing.
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
    windows, scored = [], 1  # the first token has nothing before it
    for begin in range(0, ids.numel(), stride):
        row = ids[begin : begin + context]
        end = begin + row.numel()
        scored = max(scored, begin + 1)  # so has the first token of each window
        if end > scored:
            windows.append(Window(row, ids[scored:end], scored - begin - 1))
            scored = end
        if end == ids.numel():
            break
    return windows


def after(start: Tensor, ids: Tensor, room: int, step: int, tail: bool) -> list[Window]:
    """Windows that each begin with `start` and hold at most `room` tokens of the text, `step` apart, every one scored.

    Args:
        tail: whether the last window may be shorter, so that the text's end counts.
    Raises:
        ValueError: the text fills no window.
    """
    windows, scored = [], 0
    for begin in range(0, ids.numel(), step):
        row = ids[begin : begin + room]
        end = begin + row.numel()
        if end > scored and (tail or row.numel() == room):
            windows.append(Window(torch.cat([start, row]), ids[scored:end], start.numel() - 1 + scored - begin))
            scored = end
    if not windows:
        raise ValueError(f"{ids.numel()} tokens, at least one window of {start.numel() + room} is needed")
    return windows


def rolling(ids: Tensor, context: int, prefix: int) -> list[Window]:
    """Windows of at most `context` tokens that score every token once, with as many tokens before it as fit."""
    before = torch.cat([torch.tensor([prefix]), ids])  # before[i] comes before ids[i]
    windows = []
    for begin in range(0, ids.numel(), context):
        end = min(begin + context, ids.numel())
        earliest = max(0, end - context)
        windows.append(Window(before[earliest:end], ids[begin:end], begin - earliest))
    return windows


def _word(documents: Sequence[str], tokenizer: Any, context: int, limit: int | None) -> EvaluationWindows:
    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if prefix is None:
        raise ValueError("the tokenizer has no token to begin a page with")
    chosen = [page for document in documents for page in pages(document)][:limit]
    windows = [window for page in chosen for window in rolling(_encode(tokenizer, detokenized(page)), context, prefix)]
    if not windows:
        raise ValueError("0 tokens, at least one is needed")
    # An empty word before a leading space and after a trailing one counts too: lm-eval's split does the same.
    words = sum(len(re.split(r"\s+", page)) for page in chosen)
    return EvaluationWindows(
        f"word-{context}", windows, context, words, "word", None if tokenizer.bos_token_id is None else "each page"
    )


def pages(document: str) -> list[str]:
    """A wikitext file split before each page's title, like lm-eval's data set; other documents stay whole."""
    starts = [0, *(title.start() for title in _TITLE.finditer(document))]
    parts = [document[begin:end] for begin, end in zip(starts, [*starts[1:], len(document)])]
    last = len(parts) - 1
    # The line break before a title separates two pages and belongs to neither.
    parts = [part if number == last else part.removesuffix("\n") for number, part in enumerate(parts)]
    return [part for part in parts if part.strip()]


# How lm-eval's task wikitext undoes wikitext's tokenization, in its order: literal text, then patterns, then text.
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
    """A page of wikitext with the tokenization into words undone, by the rules of lm-eval's task wikitext."""
    for old, new in _SPACED:
        page = page.replace(old, new)
    for pattern, new in _PAIRED:
        page = re.sub(pattern, new, page)
    for old, new in _REST:
        page = page.replace(old, new)
    return page
