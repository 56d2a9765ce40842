"""The report of a comparison, as terminal text, Markdown and HTML."""
