"""Downloads of checkpoints, from the Hugging Face hub and of Apple's archives."""
