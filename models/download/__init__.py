"""Fetching checkpoints: from the Hugging Face hub, and Apple's archives by name."""
