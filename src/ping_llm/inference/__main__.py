"""`python -m ping_llm.inference` is `ping-llm inference`."""

import sys

from ping_llm.cli import main

sys.exit(main(["inference", *sys.argv[1:]]))
