"""Calibration: text or conversations, cut into windows of token ids of one length."""

import hashlib
import os
import random
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config.schema import Calibrate, Dataset, TrainingSet
from ..errors import ConfigError, HubError, NumericsError
from .chat import holds_conversations, rendered
from .text import CONVERSATIONS, SUFFIXES, Rows, Text, join, read_rows
from .tokens import bounded, check_ids, encode, longest

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_HUB = re.compile(r"(?P<dataset>\w[\w.-]*/[\w.-]+)(:(?P<config>[^:]*)(:(?P<split>.+))?)?")
_CHARACTERS = 8  # characters of text for every token needed: about twice what most tokenizers take
_BLOCK = 1 << 16  # characters: several windows, so that few have a seam
_HELD_OUT = 8  # one window of so many judges what is learned from the others
_MOST = 0.9  # share of one token among all: text of any kind, DNA's four letters too, stays well below


@dataclass(frozen=True)
class Calibration:
    """Windows of token ids int64 [windows, context], every one full: there is no padding.

    name: what reports call the text. seed: of the generator that drew the windows; None where the text's first ones
    were taken.
    """

    name: str
    ids: Tensor
    seed: int | None

    def to_dict(self) -> dict[str, Any]:
        """What a run records: the text, how many tokens of it, and a hash of them."""
        windows, context = self.ids.shape
        digest = hashlib.sha256(self.ids.contiguous().numpy().tobytes()).hexdigest()
        tokens = windows * context
        return {
            "text": self.name, "windows": windows, "context": context, "tokens": tokens, "seed": self.seed,
            "sha256": digest,
        }  # fmt: skip

    def __str__(self) -> str:
        return f"{self.name}: {self.ids.shape[0]} windows of {self.ids.shape[1]} tokens"


def hold_out(ids: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Windows to learn from, and windows that judge what was learned: the last of every eight, `most` at most.

    Fewer than eight windows hold one out. A single window is both.

    Args:
        ids: int64 [windows, context].
    """
    step = min(_HELD_OUT, len(ids))
    held = [number for number in range(len(ids)) if number % step == step - 1][:most]
    others = [number for number in range(len(ids)) if number not in held]
    return ids[others or held], ids[held]


def calibrate(settings: Calibrate, tokenizer: Any, model: "PretrainedConfig") -> Calibration:
    """Windows of the text, each as long as the settings say, or as the model's context where that is shorter.

    The tokens are cut into windows; the rest that does not fill one is dropped. `windows` of them are drawn without
    replacement by a generator of their own. That generator also shuffles conversations, and picks parts of a text that
    has more than _CHARACTERS for each token needed. Where `seed` is None, everything is taken from the beginning.

    Raises:
        ConfigError, HubError: the text cannot be read, or it holds conversations and the tokenizer has no template.
        NumericsError: it is no text, it has fewer than `windows` windows, or one token makes up almost all of it.
        CheckpointError: the tokenizer gives ids that the model does not have, or its chat template fails.
    """
    context = longest(model, settings.context)
    rows = _rows(settings.text)
    ids = _tokens(rows, tokenizer, settings.windows * context, settings.seed)
    ids = _windows(rows.name, ids, settings.windows, context, settings.seed)
    _check_ids(rows.name, ids, tokenizer, model)
    return Calibration(rows.name, ids, settings.seed)


def source_of(text: str | Dataset) -> str | Dataset:
    """A file's path as it is, and "org/name", "org/name:config" or "org/name:config:split" as the Hub's data set."""
    match = _HUB.fullmatch(text) if isinstance(text, str) else None
    if match is None or match[0].lower().endswith(SUFFIXES) or os.path.isfile(match[0]):
        return text
    return TrainingSet(dataset=match["dataset"], config=match["config"] or None, split=match["split"] or "train")


def _rows(text: str | Dataset) -> Rows:
    source = source_of(text)
    if not isinstance(source, Dataset):
        return read_rows(source, ("text", *CONVERSATIONS))
    try:
        return read_rows(source, ("text", *CONVERSATIONS) if source.column == "auto" else (source.column,))
    except (ConfigError, HubError) as error:
        raise type(error)(
            f"{error}; or calibrate on a file: a recipe's calibration or --calibration, a .txt, .jsonl or .parquet"
        ) from error


def _tokens(rows: Rows, tokenizer: Any, need: int, seed: int | None) -> Tensor:
    """Token ids int64 [n]: at least `need` of them, so that windows can be drawn; fewer where the text has no more."""
    if holds_conversations(rows) and rows.values:
        size = min(len(str(rows.values)), need * _CHARACTERS)
        ids = bounded("the tokenizer's chat template", size, lambda: _conversation_ids(rows, tokenizer, need, seed))
        return torch.tensor(ids, dtype=torch.int64)
    whole = join(rows)
    part = Text(whole.name, _part(whole.content, need * _CHARACTERS, seed))
    tokens = encode(tokenizer, part)
    return tokens if tokens.numel() >= 1.1 * need or part == whole else encode(tokenizer, whole)


def _conversation_ids(rows: Rows, tokenizer: Any, need: int, seed: int | None) -> list[int]:
    ids: list[int] = []
    for text in rendered(rows, tokenizer, seed):
        # the template has put the special tokens in
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= need:
            break
    return ids


def _part(content: str, characters: int, seed: int | None) -> str:
    """About `characters` characters of the text: the first ones, or blocks drawn from all of it.

    To tokenize all of a long text takes minutes, and some hundred times its memory.
    """
    if len(content) <= characters:
        return content
    if seed is None:
        return content[:characters]
    starts = range(0, len(content), _BLOCK)
    chosen = sorted(random.Random(seed).sample(starts, min(len(starts), -(-characters // _BLOCK))))
    return "".join(content[start : start + _BLOCK] for start in chosen)


def _windows(name: str, ids: Tensor, windows: int, context: int, seed: int | None) -> Tensor:
    """ids int64 [n] -> [windows, context].

    Raises:
        NumericsError: there are too few.
    """
    available = ids.numel() // context
    if available < windows:
        advice = f"windows (--windows) to {available} or less" if available else "windows and context lower"
        raise NumericsError(
            f"{name} has {ids.numel()} tokens, calibration needs {windows * context}: {windows} windows of {context}; "
            f"give more text, or set the calibration's {advice}"
        )
    chosen = range(windows) if seed is None else sorted(random.Random(seed).sample(range(available), windows))
    return ids[: available * context].view(available, context)[list(chosen)]


def _check_ids(name: str, ids: Tensor, tokenizer: Any, model: "PretrainedConfig") -> None:
    """Refuse what nothing can be calibrated on.

    Raises:
        NumericsError: one token makes up almost all of the text.
        CheckpointError: a token that the model does not have.
    """
    check_ids(name, int(ids.max()), tokenizer, model)
    counts = torch.bincount(ids.flatten())
    token = int(counts.argmax())
    if counts[token] > _MOST * ids.numel():
        raise NumericsError(
            f"{name}: {int(counts[token])} of {ids.numel()} tokens are one and the same "
            f"({tokenizer.convert_ids_to_tokens(token)!r}), and there is nothing to learn from that; give real text"
        )
