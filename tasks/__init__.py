"""SeqIO tasks: `demo` has the demo's tasks, `paper` the paper's; `register` registers your own."""
