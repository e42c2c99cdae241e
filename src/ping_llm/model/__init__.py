"""Tokens in, logits, losses and checkpoints out. Knows nothing of data."""
