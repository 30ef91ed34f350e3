"""Everything is declared in pyproject.toml; this file is where csrc/'s native kernels will be built."""

from setuptools import setup

setup()
