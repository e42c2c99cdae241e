"""A trained model in, what happens within it out: its residual stream, its attention, its embeddings, as pictures."""
