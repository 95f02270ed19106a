"""Files: read without trust, written without loss."""
