"""From an Atlas dump to batches of tokens.

Read in order: measurement, ingest (unpack, atlas, tables, traceroute, results, tasks, prepare), rows, windows, tokenization,
pipeline, loader.
"""
