"""Checkpoints: our own (Orbax, finished stages), export, and one folder per outside format. Nothing here unpickles."""
