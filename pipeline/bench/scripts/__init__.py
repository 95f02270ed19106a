"""What each program runs, in its own Python. A script named after its program would hide it from itself."""
