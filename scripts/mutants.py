"""Modules that everything rests on in, the share of their mutants that a test notices out, and those that none does.

    python scripts/mutants.py [model/loss.py …] [--share 0.1]

mutmut copies a module with one small change in each function, runs the tests of that module, and counts the change as killed
if one of them fails. Constants of a module are not changed. What no test could notice stands with its reason in
tests/equivalent_mutants.toml and is not counted; if all mutants are tested, what stands there and fits none is reported.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zlib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORK = ROOT / "out/mutants"
EQUIVALENT = ROOT / "tests/equivalent_mutants.toml"
_MODEL = ["tests/model/test_model.py", "tests/model/test_switches.py"]
TESTS = {
    "model/gpt.py": _MODEL,
    "model/attention.py": _MODEL,
    "model/block.py": [*_MODEL, "tests/model/test_dropout.py"],
    "model/cache.py": _MODEL,
    "model/codewords.py": ["tests/model/test_codewords.py"],
    "model/counts.py": _MODEL,
    "model/dropout.py": ["tests/model/test_dropout.py"],
    "model/lookup.py": ["tests/model/test_codewords.py", "tests/model/test_switches.py"],
    "model/mlp.py": _MODEL,
    "model/loss.py": ["tests/model/test_loss.py"],
    "training/objective.py": [
        "tests/training/test_objective.py",
        "tests/training/test_compiled.py::test_the_order_of_attention_is_that_of_a_hopper_and_of_no_other_device",
    ],
    "training/optimizer.py": ["tests/training/test_optim.py"],
    "training/muon.py": ["tests/training/test_optim.py"],
    "training/schedule.py": ["tests/training/test_schedule.py"],
    "data/ingest/splits.py": ["tests/data/ingest/test_splits.py", "tests/data/ingest/test_splits_hashes.py"],
    "data/tokenization.py": ["tests/data/test_tokenization.py"],
    "inference/distribution.py": [
        "tests/inference/test_distribution.py",
        "tests/inference/test_distributions.py",
        "tests/inference/test_distribution_answers.py",
    ],
}
# mutmut leaves every decorated function alone. Under these a changed one can stand as well: only they stay above it.
DECORATORS = {"property", "cached_property", "cache", "contextmanager", "torch.no_grad()"}
LEAST_KILLED = 0.9
PATIENCE_S = 300.0  # for a mutant that waits for ever
TIME_IS_UP = (-24, 24, 36, 152, 255)  # exit codes
SURVIVED = {0: "survived", 5: "has no test", 33: "has no test"}  # by exit code


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 if too few are killed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(TESTS)}; all of them by default")
    parser.add_argument("--share", type=float, default=1.0, help="test this share of the mutants only, always the same")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if unknown := set(given.modules) - TESTS.keys():
        parser.error(f"no tests are named for {', '.join(sorted(unknown))}; add them to TESTS in {__file__}")
    if given.worker:
        mutate(given.modules[0], given.share)
        return 0
    listed = tomllib.loads(EQUIVALENT.read_text())
    all_killed = all_tested = 0
    for module in given.modules or TESTS:
        folder = prepare(module)
        command = [sys.executable, str(Path(__file__).resolve()), module, "--worker", "--share", str(given.share)]
        with (folder / "mutmut.log").open("w") as log:
            code = subprocess.run(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT).returncode
        if code:
            print(f"{module}: mutmut ended with code {code}; see {folder / 'mutmut.log'}", file=sys.stderr)
            return 1
        mutants = json.loads((folder / "mutants.json").read_text())
        known = [entry for entry in listed["mutant"] if entry["module"] == module]
        equivalent, survivors = report(module, mutants, known, listed["rule"], given.share >= 1)
        tested = len(mutants) - equivalent
        all_killed, all_tested = all_killed + tested - survivors, all_tested + tested
    print(f"all: {all_killed} of {all_tested} killed, {all_killed / max(all_tested, 1):.1%}")
    return int(all_killed < LEAST_KILLED * all_tested)


def prepare(module: str) -> Path:
    """A folder in which mutmut mutates one module; it reads its options there, and writes there alone."""
    folder = WORK / module.removesuffix(".py").replace("/", "-")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ("src", "tests", "configs", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    options = {
        "source_paths": ["src/"],
        "only_mutate": [f"src/ping_llm/{module}"],
        "also_copy": ["configs/", "scripts/"],
        "pytest_add_cli_args_test_selection": TESTS[module],
        "pytest_add_cli_args": ["-p", "no:cacheprovider", "-m", "not slow"],
        "do_not_mutate_patterns": [r"^\s*assert "],  # what only we can cause
        "process_isolation": "forkserver",
        "timeout_multiplier": 3.0,
        "timeout_constant": 20.0,
    }
    switches = ["track_dependencies = false", "use_git_change_detection = false", "use_setproctitle = false"]
    lines = ["[tool.mutmut]", *(f"{name} = {json.dumps(value)}" for name, value in options.items()), *switches]
    lines += ["[tool.pytest.ini_options]", 'markers = ["slow"]']
    (folder / "pyproject.toml").write_text("\n".join(lines) + "\n")
    return folder


def report(module: str, mutants: list[dict], known: list[dict], rules: list[dict], whole: bool) -> tuple[int, int]:
    """Prints the kill rate of a module and what survived; how many are equivalent, and how many others survived."""
    alive = [mutant for mutant in mutants if mutant["code"] in SURVIVED]
    by_rule = [mutant for mutant in alive if any(falls_under(rule["text"], mutant["change"]) for rule in rules)]
    alive = [mutant for mutant in alive if mutant not in by_rule]
    fits = [[entry for entry in known if same_change(entry, mutant)] for mutant in alive]
    survivors = [mutant for mutant, entries in zip(alive, fits, strict=True) if not entries]
    equivalent = len(by_rule) + len(alive) - len(survivors)
    tested = len(mutants) - equivalent
    killed, stopped = tested - len(survivors), sum(mutant["code"] in TIME_IS_UP for mutant in mutants)
    rate = f"{killed} of {tested} killed, {killed / max(tested, 1):.1%}"
    print(f"{module}: {rate}, {stopped} of them by the clock; {equivalent} equivalent", flush=True)
    for mutant in survivors:
        print(f"  {mutant['name']} {SURVIVED[mutant['code']]}")
        print("".join(f"    {line}\n" for line in mutant["change"]), end="")
    for entry in known if whole else ():
        if not any(entry in entries for entries in fits):
            print(f"  no survivor is {entry['function']}: {entry['to']}")
    return equivalent, len(survivors)


def falls_under(text: str, change: list[str]) -> bool:
    """Whether the old and the new line are the same without what matches a pattern."""
    old, new = (
        re.sub(r",\s*\)", ")", re.sub(text, "", "".join(line[1:] for line in change if line[0] == sign)))
        for sign in "-+"
    )
    return old == new


def same_change(entry: dict, mutant: dict) -> bool:
    """Whether a mutant is the one that an entry of the list describes, by its function and its new line."""
    new = [line[1:].strip() for line in mutant["change"] if line.startswith("+")]
    function = mutant["name"].rpartition(".")[2].partition("__mutmut_")[0].replace("ǁ", ".").removeprefix("x_")
    return function.removeprefix("x.") == entry["function"] and entry["to"] in new


def mutate(module: str, share: float) -> None:
    """Has mutmut work in this folder, and writes what became of each mutant to mutants.json."""
    extend_mutmut(share)
    from mutmut.__main__ import _run
    from mutmut.mutation.data import SourceFileMutationData
    from mutmut.mutation.diff_apply import get_diff_for_mutant

    _run([], 1)
    data = SourceFileMutationData(path=Path(f"src/ping_llm/{module}"))
    data.load()
    mutants = []
    for name, code in data.exit_code_by_key.items():
        diff = get_diff_for_mutant(name, path=data.path).splitlines()[2:] if code in SURVIVED else []
        mutants.append({"name": name, "code": code, "change": [line for line in diff if line[0] in "+-"]})
    Path("mutants.json").write_text(json.dumps(mutants, indent=1, ensure_ascii=False) + "\n")


def extend_mutmut(share: float) -> None:
    """Lets mutmut change functions under DECORATORS too, leave out all but a share of the mutants, run the quickest tests
    first, and stop mutants that loop by the time that they compute, for a busy machine makes all of them slow."""
    import libcst as cst
    from mutmut.mutation import file_mutation
    from mutmut.runners import harness
    from mutmut.state import state
    from mutmut.workers import isolation

    skips, arrange = (
        file_mutation.MutationVisitor._skip_node_and_children,
        file_mutation.function_trampoline_arrangement,
    )

    def decorated(node: cst.CSTNode) -> bool:
        if not isinstance(node, cst.FunctionDef) or not node.decorators:
            return False
        return all(cst.Module([]).code_for_node(each.decorator) in DECORATORS for each in node.decorators)

    def skip(self, node):
        return False if decorated(node) else skips(self, node)

    def arrangement(function, mutants, class_name):
        """The switch between the original and its mutants keeps the decorators; what it switches between has none."""
        bare = function.with_changes(decorators=[]) if decorated(function) else function
        before, nodes, after, names = arrange(bare, mutants, class_name)
        if bare is not function:
            nodes[0] = nodes[0].with_changes(decorators=[*function.decorators, *nodes[0].decorators])
        return before, nodes, after, [name for name in names if zlib.crc32(name.encode()) < share * 2**32]

    arguments = harness.PytestRunner._pytest_args_regular_run

    def quickest_first(self, tests):
        """Those that were seen to reach the function, then the others: a fixture may have reached it for them."""
        took_s = state().duration_by_test
        others = took_s.keys() - set(tests) if tests else ()
        return arguments(
            self, [test for group in (tests, others) for test in sorted(group, key=lambda t: (took_s[t], t))]
        )

    harness.PytestRunner._pytest_args_regular_run = quickest_first
    register_timeout = isolation.register_timeout
    isolation.register_timeout = lambda pid, limit_s: register_timeout(pid, limit_s + PATIENCE_S)
    file_mutation.MutationVisitor._skip_node_and_children = skip
    file_mutation.function_trampoline_arrangement = arrangement


if __name__ == "__main__":
    sys.exit(main())
