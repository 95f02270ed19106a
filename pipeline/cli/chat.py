"""The commands that generate text: generate and chat."""

import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from ..errors import ConfigError
from ..system.progress import progress, quiet_libraries
from .console import news, write
from .options import Device, Dtype, KernelName, Revision

app = typer.Typer()


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A folder, quantized or not, or a Hub id.")],
    prompt: Annotated[str, typer.Argument()],
    tokens: Annotated[int, typer.Option(min=1, help="How many at most.")] = 128,
    dtype: Dtype = "auto",
    kernel: KernelName = "auto",
    device: Device = "auto",
    revision: Revision = None,
) -> None:
    """Continue a prompt, greedily."""
    from bitpress.eval.measure.sample import greedy, prompt_ids

    from ..data.tokens import BoundedTokenizer
    from ..models.conversation import Printer
    from ..models.loading import load

    quiet_libraries()
    with progress("loading") as step:
        loaded, tokenizer = load(model, revision, device, dtype, kernel, step)
    try:
        ids = prompt_ids(loaded, BoundedTokenizer(tokenizer), prompt)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    with greedy(loaded):
        loaded.generate(  # type: ignore[operator]
            ids, attention_mask=ids.new_ones(ids.shape), max_new_tokens=tokens, do_sample=False,
            streamer=Printer(tokenizer, write, skip_prompt=False), pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
    write("\n")


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="A folder, quantized or not, or a Hub id.")],
    system: Annotated[str | None, typer.Option(help="Instructions for the model, before the first turn.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 1024,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0 for the most probable words; by default the model's own.")
    ] = None,
    dtype: Dtype = "auto",
    kernel: KernelName = "auto",
    device: Device = "auto",
    revision: Revision = None,
) -> None:
    """Talk with a model through its chat template, or let it answer the lines of standard input."""
    from ..models.conversation import HELP, Conversation, converse
    from ..models.loading import load

    quiet_libraries()
    with progress("loading") as step:
        loaded = load(model, revision, device, dtype, kernel, step)
    conversation = Conversation(*loaded, system, tokens, temperature)
    if sys.stdin.isatty():
        news(HELP)
    converse(conversation, _lines(), write)


def _lines() -> Iterator[str]:
    """Lines of standard input; on a terminal, a prompt asks for each."""
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
