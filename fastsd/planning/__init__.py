"""What a run will need, before it runs: settings and a machine to FLOPs, bytes, memory, seconds.

In: a configuration, hardware by name or measured here. Out: `step` (a plan), `table` (its text and
JSON), `hardware` and `measured` (what a machine can do), `fleet` (of servers). The data sheets are
in hardware_table.toml.
"""
