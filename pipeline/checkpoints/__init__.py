"""Quantized checkpoints without running them: what they are, whether they are sound, who loads them; conversion."""
