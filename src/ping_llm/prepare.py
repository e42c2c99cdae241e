"""`python -m ping_llm.prepare` is `ping-llm prepare`."""

import sys

from ping_llm.cli import main

if __name__ == "__main__":
    sys.exit(main(["prepare", *sys.argv[1:]]))
