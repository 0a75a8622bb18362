"""What the networks are, how checkpoints are read, and the errors that say what is wrong."""
