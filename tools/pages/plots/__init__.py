"""Programs that draw the figures of `docs/generated/images`."""
