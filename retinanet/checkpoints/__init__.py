"""Model files: saving and loading, transfer to other classes, and conversion from other projects."""
