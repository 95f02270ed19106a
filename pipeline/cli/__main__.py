"""`python -m bitpress.pipeline.cli` is `bitpress`."""

from .app import main

main()
