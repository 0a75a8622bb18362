"""Captions in bulk: where images come from, how they become rows, and files from which a run resumes."""
