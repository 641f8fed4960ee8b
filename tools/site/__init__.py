"""What the docs site adds to Sphinx: shapes beside the arguments of a signature, and links that work on GitHub too."""
