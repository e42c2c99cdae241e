"""Checkpoints and queries in, exact distributions of RTT out.

Read in order: distribution, query, prompt, engine, mixture; then what uses them: search, packed, score, rank, generate;
model, cli.
"""
