"""Adapters that put the ops into other projects' detectors; each is imported by name, and needs its project."""
