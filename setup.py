"""Everything is declared in pyproject.toml; this file is where compiled operators will be added."""

from setuptools import setup

setup()
