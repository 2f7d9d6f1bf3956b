"""TODO: the face of runtime."""
