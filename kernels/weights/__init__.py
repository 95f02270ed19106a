"""How weights are coded: one file for each type."""
