"""TODO: the face of training."""
