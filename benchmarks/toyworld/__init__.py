"""The toy world: a renderer, a tiny SDXL trained on it, subjects to learn, and a scorer that reads pictures."""
