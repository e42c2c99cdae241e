"""Checkpoints and questions in, exact distributions out.

Read in order: distribution, query, predictor; then what shows their answers: plots, commands.
"""
