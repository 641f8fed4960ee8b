"""Train a RetinaNet: the loop, its options, and exact resume."""
