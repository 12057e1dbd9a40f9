"""Vision encoders: one file per library, and what reduces tokens between their blocks."""
