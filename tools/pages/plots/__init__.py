"""Programs that draw the figures in `docs/generated/images`."""
