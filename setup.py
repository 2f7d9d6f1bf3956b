"""Builds csrc/ into one shared library beside fastsd_kernels; everything else is in pyproject.toml.

The library has a plain C interface and is loaded with ctypes: no torch is needed to build it, and
no torch version is baked in. Where there is no C++ compiler the installation goes on without it,
and `impl="native"` says so.
"""

from glob import glob

from setuptools import Extension, setup

NATIVE = Extension(
    "fastsd_kernels._native",
    sources=sorted(glob("csrc/*.cpp")),
    depends=sorted(glob("csrc/*.h")),
    language="c++",
    # The sources choose their own instruction sets; no -march here, one binary runs everywhere.
    extra_compile_args=[
        "-std=c++17",
        "-O3",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-fopenmp",
        "-Wno-psabi",
        "-g0",
    ],
    extra_link_args=["-fopenmp"],
    optional=True,
)

setup(ext_modules=[NATIVE])
