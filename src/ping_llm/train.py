"""`python -m ping_llm.train` is `ping-llm train`."""

import sys

from ping_llm.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
