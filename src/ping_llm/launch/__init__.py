"""A config in, its cost and its jobs on SLURM and Modal out."""
