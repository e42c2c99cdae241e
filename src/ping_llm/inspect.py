"""`python -m ping_llm.inspect` is `ping-llm inspect`."""

import sys

from ping_llm.cli import main

if __name__ == "__main__":
    sys.exit(main(["inspect", *sys.argv[1:]]))
