"""The stages of a run, in order: quantize, evaluate, report."""
