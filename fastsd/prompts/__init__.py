"""TODO: the face of prompts."""
