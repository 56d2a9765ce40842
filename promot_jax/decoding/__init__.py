"""Generation: greedy and sampled, beam search, and the text of the output."""
