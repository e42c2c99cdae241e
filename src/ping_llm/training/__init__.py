"""Rows and a config in, a trained run out."""
