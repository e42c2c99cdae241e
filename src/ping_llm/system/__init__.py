"""What any room may use: files, streams, processes, progress, hardware, the axes of pictures."""
