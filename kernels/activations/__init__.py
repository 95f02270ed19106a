"""How the inputs of a layer are quantized: one file for each type."""
