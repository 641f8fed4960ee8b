"""Programs for maintainers. Run them from the root of the repository with `python -m tools.<name>`."""
