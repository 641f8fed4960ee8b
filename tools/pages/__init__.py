"""Programs that write the pages in `docs/generated`."""
