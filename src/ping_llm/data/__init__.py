"""From an Atlas dump to batches of tokens; read in order: measurement, atlas, rows, windows, tokenization, pipeline, loader."""
