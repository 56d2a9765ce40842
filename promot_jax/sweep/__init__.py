"""Comparisons: cells of methods x seeds x settings x tasks, scheduled over processes and collected."""
