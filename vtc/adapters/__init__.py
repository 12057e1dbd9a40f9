"""Adapters: they apply a method in a model, for vision encoders and for multimodal LLMs."""
