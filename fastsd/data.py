"""Questions to train and evaluate on: procedural tasks, or rows of files (`data_files.py`).

Where training stands in its data is one number, the cursor: `take(cursor, count, seed)` is a pure
function, so a resumed run sees exactly the prompts that an uninterrupted one would have.
"""

from __future__ import annotations

import sys

from fastsd.prompts.files import DataError, read_prompts

USAGE = """usage: python -m fastsd.data check FILE [field=column ...]
       python -m fastsd.data filter [CONFIG.toml ...] --out FILE [--section.key VALUE ...]

check: the count and the first row of a data file. filter: keeps the questions that are hard but
learnable; see python -m fastsd.data filter --help."""


def main(arguments: list[str]) -> int:
    """`python -m fastsd.data`; returns the exit code."""
    if arguments[:1] == ["filter"]:
        from fastsd.filter_command import main as filter_main

        return filter_main(arguments[1:])
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    if len(arguments) < 2 or arguments[0] != "check":
        print(USAGE, file=sys.stderr)
        return 2
    columns = {field: column for field, _, column in (a.partition("=") for a in arguments[2:])}
    try:
        prompts = read_prompts(arguments[1], columns)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{arguments[1]}: {len(prompts)} rows; the first:\n{prompts[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
