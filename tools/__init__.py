"""Programs for maintainers, run from the repository's root with `python -m tools.<name>`."""
