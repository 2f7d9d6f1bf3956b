"""One run: rollouts to samples to a loss to an update, from the first to the last, and back again.

In: a configuration. Out: `session` (what stands between two updates, of `parts`), what an update is
made of (`collect`, `feedback`, `loss`, `statistics`, `optimizer`, `schedule`, `guards`), `state`
(as a checkpoint keeps it), `recorder`, `preflight`, and the programs `experiment`, `dry_run`.
"""
