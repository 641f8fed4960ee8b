"""Training of a detector: options, loop, run folder and exact resume."""
