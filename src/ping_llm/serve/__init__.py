"""Requests over HTTP in, the answers of the commands out."""
