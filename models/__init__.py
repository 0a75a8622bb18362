"""The networks, the checkpoints they are read from, and the errors."""
