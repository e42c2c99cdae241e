"""How long a test waits for what must happen: no test depends on how fast the machine is."""

HANG_S = 600.0
"""Only ends a test that would hang for ever. What is waited for comes sooner; on a busy machine nobody knows when."""
