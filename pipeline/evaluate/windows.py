"""Text and an eval section -> the windows of tokens that are scored."""

from typing import TYPE_CHECKING, Any

from bitpress.eval.measure.protocols import CONTEXTS, EvaluationWindows, evaluation_windows

from ..config.schema import Eval
from ..data.text import Text
from ..data.tokens import BoundedTokenizer, check_ids, longest
from ..errors import ConfigError, NumericsError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def windows(text: Text, tokenizer: Any, settings: Eval, model: "PretrainedConfig") -> EvaluationWindows:
    """What a model reads of a text and what is scored of it, by the protocol that the settings name.

    Raises:
        ConfigError: the settings want a BOS that the tokenizer does not have.
        NumericsError: the text fills no window. CheckpointError: a token that the model does not have, or the tokenizer
            fails.
    """
    if settings.bos == "every" and tokenizer.bos_token_id is None:
        raise ConfigError("eval.bos is every, and the model's tokenizer has no BOS token; use auto")
    context = longest(model, settings.context or CONTEXTS[settings.protocol])
    stride = min(settings.stride, context)
    try:
        plan = evaluation_windows(
            settings.protocol,
            text.documents or [text.content],
            BoundedTokenizer(tokenizer),
            context,
            stride,
            settings.windows,
            settings.bos,
        )
    except ValueError as error:
        raise NumericsError(f"{text.name} has {error}; give more text, or set eval.context lower") from error
    check_ids(text.name, plan.highest, tokenizer, model)
    return plan
