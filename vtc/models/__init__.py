"""From a name to a model."""

from __future__ import annotations
