"""Use of a trained model: detection in images, tiles and mirrored views, evaluation and drawing."""
