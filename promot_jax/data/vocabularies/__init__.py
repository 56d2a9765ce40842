"""Tokenizers of every file format behind one interface."""
