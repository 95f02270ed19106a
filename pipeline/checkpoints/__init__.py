"""What is told of a checkpoint, and made of it, without running it."""
