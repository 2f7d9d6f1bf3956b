"""Questions, and what they look like to a model.

In: a task, or rows of files. Out: `sources` gives prompts, `render` their tokens with and without
feedback, `samples` rollouts with both, ready for the loss; `files` reads and checks rows.
"""
