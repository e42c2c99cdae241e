"""Where the parts of the checkout lie that tests read."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"
CONFIGS = ROOT / "configs"
SHARED_DATA = ROOT.parent / "shared" / "data"
"""Real results of RIPE Atlas, which are not part of the project."""
