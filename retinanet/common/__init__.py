"""Errors, files and devices: what every other package of `retinanet` may import."""
