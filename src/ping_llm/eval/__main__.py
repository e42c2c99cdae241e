"""`python -m ping_llm.eval` is `ping-llm eval`."""

import sys

from ping_llm.cli import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))
