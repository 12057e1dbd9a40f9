"""One file per way of laying out image tokens."""
