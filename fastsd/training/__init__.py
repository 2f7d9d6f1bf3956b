"""One run: rollouts to samples to a loss to an update, from the first to the last, and back again.

In: a configuration. Out: `session` (what stands between two updates), what an update is made of
(`collect`, `feedback`, `loss`, `statistics`, `optimizer`, `guards`), `state` (as a checkpoint keeps
it), `recorder`, `preflight`, and the programs `experiment` and `dry_run`.
"""
