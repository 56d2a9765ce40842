"""Readers of outside model formats: one module per format, none of them executes what it reads (no pickle)."""
