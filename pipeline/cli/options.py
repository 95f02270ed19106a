"""Options that several commands have."""

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON for a script to read.")]
Revision = Annotated[str | None, typer.Option(help="A branch, tag or commit of the Hub.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
KernelName = Annotated[str, typer.Option("--kernel", help="auto, or one of `bitpress list`.")]
