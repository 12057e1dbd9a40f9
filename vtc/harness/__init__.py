"""vtc in the evaluation harnesses of others."""
