"""Shim for `pip install -e .` with old tools; everything is declared in pyproject.toml."""

from setuptools import setup

setup()
