"""Dumps or rows in, what they hold out."""
