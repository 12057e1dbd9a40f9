"""What compression costs in quality: one module for every task of `vtc eval`."""
