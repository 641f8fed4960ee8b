"""The formats of the tables of detections; apart from their writers, because --help must not wait for torch."""

FORMATS = ("csv", "coco", "geojson")
