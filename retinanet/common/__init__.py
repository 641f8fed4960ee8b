"""Errors, files, devices and field checks: the ground floor, which every other package of `retinanet` may import."""
