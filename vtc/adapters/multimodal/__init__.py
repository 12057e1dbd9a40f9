"""Multimodal LLMs of transformers: fewer image tokens where the decoder takes them in, or between its layers."""
