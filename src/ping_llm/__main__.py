"""`python -m ping_llm` is `ping-llm`."""

import sys

from ping_llm.cli import main

sys.exit(main())
