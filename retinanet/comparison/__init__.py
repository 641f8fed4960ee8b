"""The comparison of detectors that are trained on the same data, for the same number of steps, with several seeds."""
