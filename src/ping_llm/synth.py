"""`python -m ping_llm.synth` is `ping-llm synth`."""

import sys

from ping_llm.cli import main

if __name__ == "__main__":
    sys.exit(main(["synth", *sys.argv[1:]]))
