"""Dumps in, probe rows out."""
