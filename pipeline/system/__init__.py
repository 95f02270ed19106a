"""The machine, its processes and what they print."""
