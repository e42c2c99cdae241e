"""Ping results as they come in; anomalies, opened and closed once each, out."""
