"""`generate` with one call a token: its embedding, all decoder layers, the last norm, the head and the likeliest token.

transformers' own loop calls the model anew for each token, which prepares inputs, masks and outputs: that takes about
as long as some layers of a small model. Here the next tokens of one sequence, the likeliest or drawn ones, come from
another loop. Processors of logits, criteria that stop, and streamers are those of transformers, in the same order and
with the same numbers. Where none of them looks at all logits and nothing is drawn, the call itself says which is the
largest.

The first token is transformers' own, which reads the prompt. Everything else, as beams, batches, padding, and outputs
of scores, goes through transformers' loop.
"""

import copy
import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode

from bitpress.eval.measure.cache import cache_name
from bitpress.kernels.cpu.native import dense_unsupported
from bitpress.kernels.decoder_layer import Context, NativeDecoder, head_unsupported
from bitpress.kernels.linear import QLinear

from .fusing import FAILURES, Trials, Unfit

_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
_OTHERS = ("assistant_model", "custom_generate", "tokenizer", "synced_gpus", "negative_prompt_ids", "position_ids")
_OUTPUTS = ("output_attentions", "output_hidden_states", "output_scores", "output_logits")
_STEADY = {"default", "linear", "llama3", "yarn"}  # rotations of a position that do not depend on how many there are
_POSITIONS = 64  # whose rotations are computed at once
_TRIAL = (3, 5, 2, 7)  # tokens, the first of them a prompt

Read = Callable[[int], tuple[int, Tensor, Tensor]]


class NextToken:
    """What chooses the next tokens of a model whose decoder runs in one call.

    Args:
        whole: the WholeDecoder of optimize.py, which imports this file.
    Raises:
        Unfit: its embedding or head are others.
    """

    def __init__(self, model: PreTrainedModel, whole: Any):
        self.model, self.whole = model, whole
        self.embed: Any = whole.base.get_submodule(whole.embed)
        self.head: Any = model.get_output_embeddings()
        if isinstance(self.head, QLinear):
            reason, weight, self.dtype = head_unsupported(self.head), self.head, self.head.dtype
        elif "decoding" in getattr(self.head, "__dict__", {}):
            reason, weight, self.dtype = dense_unsupported(self.head.weight), self.head.weight, self.head.weight.dtype
        else:
            raise Unfit("its head is not a linear layer that the library multiplies by")
        if reason is not None:
            raise Unfit(reason)
        rows = self.embed.weight if type(self.embed) is nn.Embedding and self.embed.max_norm is None else None
        if rows is not None and (rows.dtype != self.dtype or not rows.is_contiguous() or whole.positions is not None):
            rows = None
        self.looks_up = rows is not None and len(rows) >= self.head.out_features
        self.native = NativeDecoder(whole.native, rows if self.looks_up else None, weight, self.dtype)
        parameters: Any = getattr(whole.config, "rope_parameters", None) or {}
        kinds = [parameters, *(each for each in parameters.values() if isinstance(each, dict))]
        self.positions = _POSITIONS if {each.get("rope_type", "default") for each in kinds} <= _STEADY else 1

    def unsupported(self) -> str | None:
        """Why the model is not what was compared, in a few words; None if it is."""
        modules = (self.model, self.whole.base, self.embed, self.head)
        if any(module._forward_hooks or module._forward_pre_hooks for module in modules):
            return "somebody hooked into it"
        if self.model.training or "forward" in self.model.__dict__ or torch.compiler.is_compiling():
            return "it is trained or compiled"
        whole = self.whole
        if whole.config._attn_implementation != whole.steps[0].implementation or not whole.untouched():
            return "its layers are not those that were compared"
        return None

    def reader(self, cache: Any, length: int) -> Read:
        """A function that takes the next token; it returns the likeliest one after it, the largest logit [1, 1] and the
        logits [1, vocabulary].

        Args:
            length: of the tokens that are in the cache. Both grow.
        """
        whole, native = self.whole, self.native
        x = torch.empty((1, 1, whole.native.hidden), dtype=self.dtype)
        if type(cache) is not DynamicCache or {step.length(cache, x) for step in whole.steps} != {length}:
            return self._reader_by_forward(cache)
        layers = [step.growing(cache) for step in whole.steps]
        room, first = 0, length  # places that all layers have; the position that rotations begin with
        rotations: dict[str | None, list[Any]] = {}

        def read(token: int) -> tuple[int, Tensor, Tensor]:
            nonlocal length, room, first
            if length >= room:
                rooms = [
                    layer.make_room(x[:, :, None, :0], 1, step.rounding) for layer, step in zip(layers, whole.steps)
                ]
                native.begin(
                    [
                        Context(keys, values, None, start, step.window, step.coding)
                        for step, (keys, values, start) in zip(whole.steps, rooms)
                    ]
                )
                room = min(start + keys["codes"].shape[2] for keys, _, start in rooms)
            if not rotations or length - first == self.positions:
                first, tokens = length, torch.arange(length, length + self.positions).unsqueeze(0)
                for step in {step.kind: step for step in whole.steps}.values():
                    tables = step.rotation(x, tokens)
                    places = range(self.positions)
                    rotations[step.kind] = [
                        tables and (tables[0][:, i : i + 1].contiguous(), tables[1][:, i : i + 1].contiguous())
                        for i in places
                    ]
            row = None
            if not self.looks_up:
                row = self.embed(torch.tensor([[token]]))
                if whole.positions is not None:
                    row = row + whole.base.get_submodule(whole.positions)(torch.tensor([[length]]))
            best = native.next(token, length, [rotations[step.kind][length - first] for step in whole.steps], row)
            for layer in layers:
                layer.advance(1)
            length += 1
            return best, native.largest, native.logits

        return read

    def _reader_by_forward(self, cache: Any) -> Read:
        """As `reader`, by the model's own forward."""
        model: Any = self.model
        name = cache_name(model) or "past_key_values"

        def read(token: int) -> tuple[int, Tensor, Tensor]:
            logits = model(input_ids=torch.tensor([[token]]), **{name: cache}, use_cache=True).logits[:, -1]
            return int(logits.argmax(-1)), logits.amax(-1, keepdim=True), logits

        return read


def choose_tokens(model: PreTrainedModel, whole: Any, trials: Trials) -> str | None:
    """Let `generate` have one call a token, or say in a few words why it does not.

    It does after some tokens had the same logits, to the bit, as by the model's own forward.
    """
    if "generate" in model.__dict__:
        return "its generate was replaced"
    try:
        own = NextToken(model, whole)
        trials.run("tokens", functools.partial(_try_tokens, own))
    except Unfit as reason:
        return str(reason)
    model.decoding = own  # type: ignore[assignment]
    model.generate = MethodType(_generate, model)  # type: ignore[assignment]
    return None


@torch.inference_mode()
def _try_tokens(own: NextToken) -> None:
    """Raises Unfit: a token's logits are others than by the model's own forward, or it cannot be run so."""
    model: Any = own.model
    name = cache_name(model) or "past_key_values"
    try:
        theirs, ours = DynamicCache(config=model.config), DynamicCache(config=model.config)
        for cache in (theirs, ours):
            model(input_ids=torch.tensor([_TRIAL[:1]]), **{name: cache}, use_cache=True)
        read = own.reader(ours, 1)
        for token in _TRIAL[1:]:
            expected = model(input_ids=torch.tensor([[token]]), **{name: theirs}, use_cache=True).logits[:, -1]
            best, largest, logits = read(token)
            if not torch.equal(logits, expected) or best != int(expected.argmax(-1)) or largest != expected.amax():
                raise Unfit("the model computes something else than its decoder and a head")
    except FAILURES as error:
        raise Unfit(f"the model cannot be tried: {error}") from error


def _generate(model: Any, *arguments: Any, **options: Any) -> Any:
    """Stands in the place of a model's `generate`."""
    usual, streamer = type(model).generate, options.get("streamer")
    configs = [copy.deepcopy(each) for each in (model.generation_config, options.get("generation_config")) if each]
    for config in configs:
        config.update(**{name: value for name, value in options.items() if hasattr(config, name)})
    others = len(arguments) > 1 or any(options.get(name) is not None for name in _OTHERS)
    if others or any(config.get_generation_mode() not in _MODES for config in configs):
        return usual(model, *arguments, **options)

    def sample(self: Any, input_ids: Tensor, stopping_criteria: StoppingCriteriaList, **settings: Any) -> Any:
        own, name = self.__dict__.get("decoding"), cache_name(self) or ""
        known = {name, "use_cache", "logits_to_keep", "position_ids", "logits_processor", "generation_config"}
        more = [key for key in settings.keys() - known if settings[key] is not None]
        wanted = any(getattr(settings["generation_config"], key, None) for key in _OUTPUTS)
        fits = (
            isinstance(own, NextToken)
            and len(input_ids) == 1
            and settings.get("use_cache")
            and settings.get(name) is not None
        )
        if not fits or more or wanted or own.unsupported() is not None:
            return type(self)._sample(
                self, input_ids, stopping_criteria=stopping_criteria, streamer=streamer, **settings
            )
        return _sample(own, input_ids, stopping_criteria, streamer, settings[name], settings)

    return usual(model, *arguments, **options, custom_generate=sample)


class _Once(StoppingCriteria):
    """Stops after one token, and keeps what the criteria said of it."""

    def __init__(self, criteria: StoppingCriteriaList):
        self.criteria, self.stops = criteria, False

    def __call__(self, input_ids: Tensor, scores: Any, **more: Any) -> Any:
        stops = self.criteria(input_ids, scores, **more)
        self.stops = bool(stops.all())
        return torch.ones_like(stops)


class _Unended:
    """A streamer that is not told that the text ends."""

    def __init__(self, streamer: Any):
        self.put = streamer.put

    def end(self) -> None:
        return None


def _sample(
    own: NextToken,
    input_ids: Any,
    stopping_criteria: StoppingCriteriaList,
    streamer: Any,
    cache: Any,
    settings: dict[str, Any],
) -> Any:
    """What transformers' `_sample` returns for one sequence. settings: its other arguments, cache among them."""
    config, processors, once = settings["generation_config"], settings["logits_processor"], _Once(stopping_criteria)
    kind: Any = type(own.model)
    output = kind._sample(
        own.model, input_ids, stopping_criteria=StoppingCriteriaList([once]),
        streamer=None if streamer is None else _Unended(streamer), **settings,
    )  # fmt: skip
    input_ids = output if isinstance(output, Tensor) else output.sequences
    read = own.reader(cache, input_ids.shape[1] - 1)
    by_largest = not config.do_sample and all(getattr(each, "reads_largest_alone", False) for each in processors)
    stops = once.stops
    while not stops:
        token, largest, logits = read(int(input_ids[0, -1]))
        scores = processors(input_ids, largest if by_largest else logits.to(torch.float32, copy=True))
        if config.do_sample:
            token = int(torch.multinomial(nn.functional.softmax(scores, dim=-1), num_samples=1))
        elif not by_largest:
            token = int(scores.argmax(-1))
        input_ids = torch.cat([input_ids, input_ids.new_tensor([[token]])], -1)
        stops = bool(stopping_criteria(input_ids, None).all())
        if streamer is not None:
            streamer.put(input_ids[0, -1:])
    if streamer is not None:
        streamer.end()
    if not config.return_dict_in_generate:
        return input_ids
    return GenerateDecoderOnlyOutput(sequences=input_ids, past_key_values=cache)
