"""A seed in, an Internet with known latency and its pings out."""
