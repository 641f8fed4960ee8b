"""The values of the options of an export, which the command line knows without torch."""

#: The suffix of the files of each format.
SUFFIXES = {"pt2": ".pt2", "onnx": ".onnx", "aoti": ".pt2"}
POSTPROCESSING = ("nms", "raw")
