"""What a run writes beside its checkpoints, and how it is read back.

In: numbers and rollouts of an update. Out: `folder` (metrics and evaluations), `completions`, and
`trackers` that pass metrics on. Files are the interface: reports need nothing else.
"""
