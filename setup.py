"""Everything is declared in pyproject.toml; this file is where the build of csrc/ will hook in."""

from setuptools import setup

setup()
