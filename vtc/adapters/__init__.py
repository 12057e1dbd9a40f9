"""What places a method in a model: vision encoders, and multimodal LLMs."""
