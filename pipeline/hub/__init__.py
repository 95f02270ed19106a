"""Models and their failures on the Hugging Face Hub."""
