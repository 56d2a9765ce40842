"""Training: settings, state, step, loop, losses, optimizer."""
