"""Queries and what predicts them in, scores beside baselines that saw the same rows out."""
