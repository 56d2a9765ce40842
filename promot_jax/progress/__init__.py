"""What a user sees while a job runs: one live line on a terminal, plain lines elsewhere."""
