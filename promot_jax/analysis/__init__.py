"""What is computed from outputs and curves after the fact: intervals, format share, matched target score."""
