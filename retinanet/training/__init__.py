"""Training of a RetinaNet: options, loop, run folder and exact resume."""
