"""vtc in other projects' evaluation harnesses."""
