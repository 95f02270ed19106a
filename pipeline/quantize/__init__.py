"""A recipe and a checkpoint become an artifact."""
