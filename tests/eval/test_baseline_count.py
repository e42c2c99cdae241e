"""The number of baselines that is told is that of the list."""

from pathlib import Path

from ping_llm.eval import baselines

ROOT = Path(__file__).parents[2]
WORDS = {16: "sixteen", 17: "seventeen", 18: "eighteen", 19: "nineteen"}


def test_readme_plan_and_code_tell_the_number_of_baselines():
    word = WORDS[len(baselines.all_baselines())]
    for text in ((ROOT / "README.md").read_text(), (ROOT / "PLAN.md").read_text(), baselines.__doc__):
        assert word in text and not any(other in text for other in WORDS.values() if other != word)
