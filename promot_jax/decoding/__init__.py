"""Generation: greedy, sampled and beam search, and the text of the output."""
