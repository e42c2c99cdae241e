"""What any room may use: files, disks, processes, progress, hardware, the axes of pictures."""
