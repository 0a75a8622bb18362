"""Fewer bits, and what they cost."""
