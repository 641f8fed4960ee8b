"""Runs torchvision's own tests on the ops and on accelerated models; see `__main__.py`."""
