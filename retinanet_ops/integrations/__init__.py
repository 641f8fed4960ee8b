"""Adapters that run the ops inside detectors of other projects. Each module needs its project to be installed."""
