"""From an Atlas dump to batches of tokens.

Read in order: measurement, atlas, rows, windows, tokenization, pipeline, loader.
"""
