"""Find objects with a trained model: whole images, tiles and mirrored views; evaluation and drawing."""
