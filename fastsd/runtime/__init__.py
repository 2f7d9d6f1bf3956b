"""How a process runs: alone or as a rank, on which hardware, told to stop, waiting for workers.

In: settings as plain values, functions to call. Out: `world` and `agreement` of many ranks, the
`program` around a command's work, `signals`, `phases`, `hardware`, whole and local `shards`,
`workers` that can be killed and the `sandbox` in them, `files` that appear whole.
"""
