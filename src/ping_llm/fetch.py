"""`python -m ping_llm.fetch` is `ping-llm fetch`."""

import sys

from ping_llm.cli import main

if __name__ == "__main__":
    sys.exit(main(["fetch", *sys.argv[1:]]))
