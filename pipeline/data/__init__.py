"""Text and conversations to tokens."""
