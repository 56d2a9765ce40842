"""SeqIO registrations: `demo` holds the offline demonstration tasks, `register` is what a module of your own calls."""
