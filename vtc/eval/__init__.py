"""Measurements on real images: `elpv` (with labels), `photos` (without), `spectral` (the token graph)."""
