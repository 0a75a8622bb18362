"""The OpenAI-compatible server: one model, many clients, continuous batching."""
