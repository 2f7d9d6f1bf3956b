"""A run's state on disk: whole or not there, checked when it is read.

In: a state, tensors and what writes the model. Out: checkpoint-STEP folders, and the newest valid
one again, on any number of ranks. Other rooms also use `manifest`, `tensors` (of spread weights)
and `matches` (whether a checkpoint and a run are the same experiment).
"""

from fastsd.checkpoint.folder import LoadedCheckpoint, checkpoints, load_latest, save_checkpoint

__all__ = ["LoadedCheckpoint", "checkpoints", "load_latest", "save_checkpoint"]
