"""The command `vtc`."""
