"""Vision encoders: one file per library, and the code that reduces tokens between their blocks."""
