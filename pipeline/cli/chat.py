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
TopP = Annotated[
    float | None, typer.Option(min=0, max=1, help="Draws from the likeliest tokens that sum up to this probability.")
]
Seed = Annotated[int | None, typer.Option(min=0, help="Of the draws; by default another one each time, which is told.")]


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A folder, quantized or not, or a Hub id.")],
    prompt: Annotated[str, typer.Argument()],
    tokens: Annotated[int, typer.Option("--max-tokens", "--tokens", min=1, help="How many at most.")] = 128,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, help="Draws tokens, the more freely the higher; by default 0: the likeliest."),
    ] = None,
    top_p: TopP = None,
    seed: Seed = None,
    dtype: Dtype = "auto",
    kernel: KernelName = "auto",
    device: Device = "auto",
    revision: Revision = None,
) -> None:
    """Continue a prompt."""
    from bitpress.eval.measure.sample import greedy, prompt_ids

    from ..data.tokens import BoundedTokenizer
    from ..models.generation import Printer, Sampling
    from ..models.generation import generate as generate_text
    from ..models.loading import load

    quiet_libraries()
    sampling = Sampling((0 if top_p is None else 1) if temperature is None else temperature, top_p, seed)
    with progress("loading") as step:
        loaded, tokenizer = load(model, revision, device, dtype, kernel, step)
    try:
        ids = prompt_ids(loaded, BoundedTokenizer(tokenizer), prompt)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    with greedy(loaded):  # nothing of the checkpoint's own settings but where a text ends
        printer = Printer(tokenizer, write, skip_prompt=False)
        _, said = generate_text(loaded, ids, tokens, sampling, printer, pad_token_id=tokenizer.eos_token_id)
    write("\n")
    news(said)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="A folder, quantized or not, or a Hub id.")],
    system: Annotated[str | None, typer.Option(help="Instructions for the model, before the first turn.")] = None,
    tokens: Annotated[
        int, typer.Option("--max-tokens", "--tokens", min=1, help="Tokens of an answer, at most.")
    ] = 1024,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0 for the most probable words; by default the model's own.")
    ] = None,
    top_p: TopP = None,
    seed: Seed = None,
    dtype: Dtype = "auto",
    kernel: KernelName = "auto",
    device: Device = "auto",
    revision: Revision = None,
) -> None:
    """Talk with a model through its chat template, or let it answer the lines of standard input."""
    from ..models.conversation import HELP, Conversation, converse
    from ..models.generation import Sampling
    from ..models.loading import load

    quiet_libraries()
    sampling = Sampling(temperature, top_p, seed)
    with progress("loading") as step:
        loaded = load(model, revision, device, dtype, kernel, step)
    conversation = Conversation(*loaded, system, tokens, sampling)
    if sys.stdin.isatty():
        news(HELP)
    converse(conversation, _lines(), write, news)


def _lines() -> Iterator[str]:
    """Lines of standard input; on a terminal, a prompt asks for each."""
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
