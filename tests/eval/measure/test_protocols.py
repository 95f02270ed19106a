"""Each protocol against a loop written from its description, with transformers' own loss and nothing of bitpress."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitpress.eval.measure import bos, protocols, scores
from bitpress.eval.measure.protocols import evaluation_windows, halves, rolling, sliding
from bitpress.eval.measure.statistics import summarize

PAGES = [
    ' = First page = \n \n The first , the 1 @,@ 000th , page \'s text ; with " quotes " and ( brackets ) . \n',
    " = Second = \n \n One , of 3 @.@ 5 lines : \n \n = = A section = = \n \n a well @-@ known end . \n",
    " = Third = \n N \n",
]
TEXT = "\n".join(PAGES)


@pytest.fixture(scope="module")
def model(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    return AutoTokenizer.from_pretrained(tiny_llama)


class Beginning:
    """A tokenizer that starts each text with token 7."""

    bos_token_id, eos_token_id = 7, 9

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, text, **settings):
        return {"input_ids": [7, *self.inner(text, **settings)["input_ids"]]}


class WithBos:
    """A tokenizer that has token 7 as BOS, and does not put it before a text."""

    bos_token_id, eos_token_id = 7, 9

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, text, **settings):
        return self.inner(text, **settings)


@torch.inference_mode()
def losses(model, ids, labels):
    """Minus log-probabilities of the labels that are not -100, by transformers' convention of shifted labels."""
    logits = model(torch.tensor([ids])).logits[0, :-1].double()
    return nn.functional.cross_entropy(logits, torch.tensor(labels[1:]), reduction="none", ignore_index=-100)


def measured(model, plan):
    return summarize(scores.score(model, plan.windows), plan.units)["perplexity"]


# The figures below differ by float32 sums alone: bitpress's softmax is in float32, the loops' in float64.
CLOSE = 1e-6


@pytest.mark.parametrize("context", [2, 7, 32])
def test_gptq(model, tokenizer, context):
    ids = tokenizer("\n\n".join(PAGES))["input_ids"]
    total = count = 0
    for begin in range(0, len(ids) - context + 1, context):
        window = ids[begin : begin + context]
        total += losses(model, window, window).sum().item()
        count += context - 1
    plan = evaluation_windows("gptq", PAGES, tokenizer, context, 1, None)
    assert (plan.name, plan.tokens, plan.units, plan.unit) == (f"gptq-{context}", count, count, "token")
    assert measured(model, plan) == pytest.approx(math.exp(total / count), rel=CLOSE)


@pytest.mark.parametrize(("context", "stride"), [(32, 8), (32, 32), (16, 5), (500, 7), (8, 1)])
def test_sliding(model, tokenizer, context, stride):
    """As the documentation of transformers describes it: what an earlier window has scored is masked."""
    ids = tokenizer(TEXT[:150])["input_ids"]
    total = count = previous = 0
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        window = ids[begin:end]
        labels = [-100] * (len(window) - (end - previous)) + window[len(window) - (end - previous) :]
        nll = losses(model, window, labels)
        total += nll.sum().item()
        count += int(nll.ne(0).sum())
        previous = end
        if end == len(ids):
            break
    plan = evaluation_windows("sliding", [TEXT[:150]], tokenizer, context, stride, None)
    assert (plan.name, plan.tokens) == (f"sliding-{context}/{stride}", count)
    # each token once, but the first of the text, or of each window where they do not overlap
    assert count == len(ids) - (1 if stride < context else -(-len(ids) // context))
    assert measured(model, plan) == pytest.approx(math.exp(total / count), rel=CLOSE)


@pytest.mark.parametrize("context", [3, 7, 32])
@pytest.mark.parametrize("begins", [False, True])
def test_llama_cpp(model, tokenizer, context, begins):
    """perplexity.cpp: of each chunk the logits from n_ctx / 2 to n_ctx - 2; where there is one, BOS begins a chunk."""
    chosen = Beginning(tokenizer) if begins else tokenizer
    ids = chosen("".join(PAGES))["input_ids"]  # the file as it is: no blank lines between documents
    total = count = 0
    for chunk in range(len(ids) // context):
        window = ids[chunk * context : (chunk + 1) * context]
        if begins:
            window[0] = 7
        nll = losses(model, window, window)[context // 2 :]
        total += nll.sum().item()
        count += len(nll)
    plan = evaluation_windows("llama.cpp", PAGES, chosen, context, 1, None)
    assert (plan.name, plan.tokens) == (f"llama.cpp-{context}", count)
    assert count == len(ids) // context * (context - context // 2 - 1)
    assert measured(model, plan) == pytest.approx(math.exp(total / count), rel=CLOSE)


@pytest.mark.parametrize("context", [2, 7, 32])
def test_gptq_where_texts_begin_with_bos(model, tokenizer, context):
    """Each window: BOS, and context - 1 tokens of the text, all of them scored; the tail is dropped."""
    ids = tokenizer("\n\n".join(PAGES))["input_ids"]
    room, total, count = context - 1, 0, 0
    for begin in range(0, len(ids) - room + 1, room):
        window = [7, *ids[begin : begin + room]]
        total += losses(model, window, window).sum().item()
        count += room
    plan = evaluation_windows("gptq", PAGES, Beginning(tokenizer), context, 1, None)
    assert (plan.name, plan.tokens, plan.bos) == (f"gptq-{context}+bos", count, "each window")
    assert measured(model, plan) == pytest.approx(math.exp(total / count), rel=CLOSE)
    every = evaluation_windows("gptq", PAGES, WithBos(tokenizer), context, 1, None, "every")
    assert all(torch.equal(one.ids, other.ids) for one, other in zip(plan.windows, every.windows, strict=True))


@pytest.mark.parametrize(("context", "stride"), [(33, 8), (33, 32), (33, 33), (17, 5), (500, 7), (9, 1)])
def test_sliding_where_texts_begin_with_bos(model, tokenizer, context, stride):
    """Each token of the text is scored once, by the first window that reads it."""
    ids = tokenizer(TEXT[:150])["input_ids"]
    step, total, previous = min(stride, context - 1), 0, 0
    for begin in range(0, len(ids), step):
        end = min(begin + context - 1, len(ids))
        window = [7, *ids[begin:end]]
        total += losses(model, window, [-100] * (1 + previous - begin) + ids[previous:end]).sum().item()
        previous = end
        if end == len(ids):
            break
    plan = evaluation_windows("sliding", [TEXT[:150]], Beginning(tokenizer), context, stride, None)
    assert (plan.name, plan.tokens, plan.bos) == (f"sliding-{context}/{stride}+bos", len(ids), "each window")
    assert all(window.ids[0] == 7 and window.ids.numel() <= context for window in plan.windows)
    assert measured(model, plan) == pytest.approx(math.exp(total / len(ids)), rel=CLOSE)


def test_bos_in_the_first_window_alone_is_as_papers_have_it(tokenizer):
    plan = evaluation_windows("gptq", PAGES, Beginning(tokenizer), 32, 1, None, "first")
    ids = Beginning(tokenizer)("\n\n".join(PAGES))["input_ids"]
    assert (plan.name, plan.bos) == ("gptq-32", "the first window alone")
    assert [window.ids.tolist() for window in plan.windows] == [ids[i : i + 32] for i in range(0, len(ids) - 31, 32)]
    for choice in ("auto", "first"):  # a tokenizer that puts no BOS in front: as ever
        plain = evaluation_windows("gptq", PAGES, WithBos(tokenizer), 32, 1, None, choice)
        assert (plain.name, plain.bos, plain.windows[0].ids[0]) == ("gptq-32", None, ids[1])


def test_two_tokens_begin_each_window_where_two_begin_a_text(tokenizer):
    class Glm(Beginning):
        bos_token_id = None

        def __call__(self, text, **settings):
            return {"input_ids": [5, *super().__call__(text, **settings)["input_ids"]]}

    plan = evaluation_windows("gptq", PAGES, Glm(tokenizer), 16, 1, None)
    assert all(window.ids[:2].tolist() == [5, 7] and window.targets.numel() == 14 for window in plan.windows)
    with pytest.raises(ValueError, match="windows of 2 tokens have no room for text after 2 that begin it"):
        evaluation_windows("gptq", PAGES, Glm(tokenizer), 2, 1, None)


class Needy(nn.Module):
    """Predicts that each token comes again, if the text begins with token 7; otherwise all tokens alike."""

    def forward(self, input_ids, use_cache=False):
        table = 9.0 * nn.functional.one_hot(input_ids, 256).float()
        return SimpleNamespace(logits=table if input_ids[0, 0] == 7 else 0 * table)


def test_what_a_model_is_without_bos():
    effect = bos.bos_effect(Needy(), torch.tensor([7]), torch.full((50,), 3))
    sure = math.exp(9) / (math.exp(9) + 255)
    assert effect == pytest.approx({"with": 1 / sure, "without": 256})
    assert "the windows begin as it needs them" in bos.bos_warning(effect, begin=True)
    assert "set eval.bos: every" in bos.bos_warning(effect, begin=False)
    assert "set eval.bos: first" in bos.bos_warning({"with": 256.0, "without": 2.0}, begin=True)
    assert bos.bos_warning({"with": 10.0, "without": 11.0}, begin=False) is None
    assert bos.bos_effect(Needy(), torch.tensor([7]), torch.tensor([3])) is None


def test_llama_cpp_reads_a_data_set_of_lines_as_the_file_that_it_was(tokenizer):
    lines = ["one\n", "", "two\n", "three"]
    plan = evaluation_windows("llama.cpp", lines, tokenizer, 4, 1, None)
    assert tokenizer.decode(torch.cat([window.ids for window in plan.windows])) == "one\n\ntwo\nthree\n"[:12]


@pytest.mark.parametrize("context", [1, 7, 1000])
def test_word(model, tokenizer, context):
    """lm-eval's rolling log-likelihood, one token at a time: each sees what its window holds before it."""
    total = words = 0
    for page in PAGES:
        ids = tokenizer(protocols.detokenized(page))["input_ids"]
        begun = [tokenizer.eos_token_id, *ids]
        for block in range(0, len(ids), context):
            end = min(block + context, len(ids))
            for position in range(block, end):  # begun[position] comes before ids[position]
                seen = begun[max(0, end - context) : position + 1]
                with torch.inference_mode():
                    log_p = model(torch.tensor([seen])).logits[0, -1].double().log_softmax(-1)
                total -= log_p[ids[position]].item()
        words += len(re.split(r"\s+", page))
    plan = evaluation_windows("word", PAGES, tokenizer, context, 1, None)
    assert (plan.name, plan.units, plan.unit) == (f"word-{context}", words, "word")
    assert max(window.ids.numel() for window in plan.windows) <= context
    # forwards of other lengths sum in another order
    assert measured(model, plan) == pytest.approx(math.exp(total / words), rel=1e-5)


@pytest.mark.parametrize("context", [16, 64])
def test_word_is_lm_evals_own(model, tokenizer, context):
    """lm-eval's code on the same pages, from the task's detokenizer to its count of words."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    task = pytest.importorskip("lm_eval.tasks.wikitext.preprocess_wikitext")
    theirs = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=context)
    requests = [SimpleNamespace(args=(task.wikitext_detokenizer({"page": page}),)) for page in PAGES]
    values = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    results = [task.process_results({"page": page}, (value,))["word_perplexity"] for page, value in zip(PAGES, values)]
    expected = math.exp(-sum(value for value, _ in results) / sum(words for _, words in results))
    assert measured(model, evaluation_windows("word", [TEXT], tokenizer, context, 1, None)) == pytest.approx(
        expected, rel=1e-5
    )


def test_pages_are_parted_at_titles_and_not_at_sections():
    assert protocols.pages(TEXT) == PAGES
    assert protocols.pages("no title = at = all\n") == ["no title = at = all\n"]
    assert protocols.pages(" \n = A = \nb") == [" = A = \nb"]


def test_what_is_undone_of_wikitexts_tokenization():
    assert protocols.detokenized(PAGES[0]) == (
        ' = First page =\n\nThe first, the 1,000th, page\'s text; with "quotes" and (brackets).\n'
    )
    assert (
        protocols.detokenized("= = A = = \n a @-@ b 3 @.@ 5 boys ' N [ x ] { y }") == "== A ==\na-b 3.5 boys' 1 [x] {y}"
    )


def test_words_take_a_limit_of_pages(tokenizer):
    one, both = (evaluation_windows("word", PAGES, tokenizer, 64, 1, limit) for limit in (1, None))
    assert one.units == len(re.split(r"\s+", PAGES[0]))
    assert both.windows[: len(one.windows)][0].targets.equal(one.windows[0].targets)
    assert len(both.windows) > len(one.windows)


def test_windows_stop_at_the_limit_and_drop_the_tail():
    ids = torch.arange(11)
    assert [window.ids.tolist() for window in halves(ids, 4, 0)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(halves(torch.arange(4), 4, 0)) == 1
    assert [(w.ids.tolist(), w.targets.tolist(), w.first) for w in sliding(torch.arange(5), 3, 2)] == [
        ([0, 1, 2], [1, 2], 0),
        ([2, 3, 4], [3, 4], 0),
    ]
    assert [(w.ids.tolist(), w.targets.tolist(), w.first) for w in rolling(torch.arange(5), 3, 9)] == [
        ([9, 0, 1], [0, 1, 2], 0),
        ([1, 2, 3], [3, 4], 1),
    ]


def test_a_limit_of_windows(tokenizer):
    plan = evaluation_windows("gptq", [TEXT], tokenizer, 8, 1, 3)
    assert (len(plan.windows), plan.tokens, plan.units) == (3, 21, 21)
    assert plan.highest == max(tokenizer(TEXT[:24])["input_ids"])


@pytest.mark.parametrize(
    ("protocol", "text", "context", "said"),
    [
        ("gptq", "abc", 4, "3 tokens, at least one window of 4 is needed"),
        ("llama.cpp", "ab", 4, "3 tokens, at least one window of 4"),  # with the line's end
        ("llama.cpp", "abcd", 2, "windows of 2 tokens have none to score"),
        ("sliding", "a", 4, "1 tokens, at least two are needed"),
        ("word", " \n", 4, "0 tokens"),
    ],
)
def test_too_short_a_text(tokenizer, protocol, text, context, said):
    with pytest.raises(ValueError, match=said):
        evaluation_windows(protocol, [text], tokenizer, context, 1, None)


def test_words_need_a_token_to_begin_with():
    with pytest.raises(ValueError, match="no token to begin a page with"):
        evaluation_windows("word", PAGES, SimpleNamespace(bos_token_id=None, eos_token_id=None), 8, 1, None)
