"""Turns conversations into the text that a model reads, by its tokenizer's chat template."""

import random
from collections.abc import Iterator
from typing import Any

from ..errors import CheckpointError, ConfigError, NumericsError
from .text import CONVERSATIONS, Rows, check_unicode

_KEYS = (("role", "content"), ("from", "value"))  # the second as ShareGPT has them, with roles of its own
_ROLES = {"human": "user", "gpt": "assistant"}
# Some templates put in the date. A run that goes on tomorrow must see the same tokens, so the date is always this one.
_DATE = (
    "{%- macro strftime_now(format) -%}{{ format | replace('%d', '01') | replace('%m', '01') | replace('%b', 'Jan')"
    " | replace('%B', 'January') | replace('%Y', '2025') }}{%- endmacro %}\n"
)


def rendered(rows: Rows, tokenizer: Any, seed: int | None) -> Iterator[str]:
    """Each conversation as the model reads it, special tokens included, shuffled; in order where `seed` is None.

    The template comes from the checkpoint and is not trusted: transformers renders it in a sandbox, without files or
    imports.

    Raises:
        ConfigError: the tokenizer has no template. NumericsError: a row that is no conversation.
        CheckpointError: the template fails.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            f"{rows.name} holds conversations ({rows.column}), and the model's tokenizer has no chat template to put "
            "them through; give plain text, or the model's chat version"
        )
    numbered = list(enumerate(rows.values, 1))
    if seed is not None:
        random.Random(seed).shuffle(numbered)
    for number, row in numbered:
        messages = _messages(row, f"{rows.name}: row {number}")
        try:
            template = _DATE + tokenizer.get_chat_template()
            text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        except Exception as error:  # the template is a stranger's program
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise CheckpointError(
                f"{rows.name}: row {number}: the tokenizer's chat template fails on it: {reason}; "
                "take another data set, or mend the template"
            ) from error
        check_unicode(f"{rows.name}: row {number}", text)
        yield text


def holds_conversations(rows: Rows) -> bool:
    """Whether a column holds conversations, by its name or by its first value."""
    first = next((value for value in rows.values if value is not None), None)
    return rows.column in CONVERSATIONS or isinstance(first, list)


def _messages(row: Any, where: str) -> list[dict[str, Any]]:
    """A row's messages in the form that templates take: [{"role", "content"}], and "tool_calls" where it has any.

    Raises:
        NumericsError: the row is no list of messages, or a message holds what is no text.
    """
    messages = []
    for item in row if isinstance(row, list) else []:
        calls = item.get("tool_calls") if isinstance(item, dict) else None
        pairs = [
            (item[role_key], item.get(content_key))
            for role_key, content_key in (_KEYS if isinstance(item, dict) else ())
            if isinstance(item.get(role_key), str) and (content_key in item or calls)
        ]
        if not pairs:
            raise NumericsError(f"{where} holds the message {item!r:.60}, expected role and content, both text")
        role, content = next((pair for pair in pairs if pair[1] is not None), pairs[0])
        message = {"role": _ROLES.get(role, role), "content": _content(content, where)}
        messages.append(message | ({"tool_calls": calls} if calls else {}))
    if not messages:
        raise NumericsError(f"{where} holds {row!r:.40}, expected a list of messages with role and content")
    return messages


def _content(content: Any, where: str) -> str:
    """A message's text: itself, its parts of text one below the other, or "" for null, as where a tool is called."""
    if content is None:
        return ""
    texts: list[str] = []
    for part in content if isinstance(content, list) else [content]:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            raise NumericsError(f"{where} holds the content {part!r:.60}, expected text, or parts with type and text")
        texts.append(text)
    return "\n".join(texts)
