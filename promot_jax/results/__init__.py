"""What a run leaves: typed results, intervals, matched target score, provenance."""
