"""Models: an embedding, a stack under one wiring, a head."""
