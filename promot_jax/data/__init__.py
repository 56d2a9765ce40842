"""From SeqIO text examples to model batches."""
