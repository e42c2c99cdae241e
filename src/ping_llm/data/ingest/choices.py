"""What a user chooses of `prepare`, by name; apart, so that the command line need not import what acts on it."""

from typing import Literal

Packets = Literal["one", "all"]
"""Of a result: one packet, picked by a hash, or each."""

Split = Literal["pingbench", "none"]
"""The rules of splits.py, or everything in train."""

Traceroute = Literal["off", "target", "hops"]
"""Traceroutes counted and dropped, or replies of their targets, or those of all hops."""
