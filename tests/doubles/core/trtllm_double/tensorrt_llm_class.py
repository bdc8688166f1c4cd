"""Later."""

LLM = None
