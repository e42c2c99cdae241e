"""A folder in, the files in it by which transformers' AutoClasses find the classes of the installed package out."""

from __future__ import annotations

import os
from pathlib import Path

from ping_llm.system.files import write_atomically

CONFIGURATION, MODELING = "configuration_ping_llm", "modeling_ping_llm"
AUTO_MAP = {
    "AutoConfig": f"{CONFIGURATION}.PingGPTConfig",
    "AutoModel": f"{MODELING}.PingGPTModel",
    "AutoModelForCausalLM": f"{MODELING}.PingGPTForCausalLM",
}
_HEAD = '"""The classes of this model are those of the installed package: pip install ping-llm[hf]"""'
_FILES = {
    CONFIGURATION: "from ping_llm.hf.configuration import PingGPTConfig",
    MODELING: "from ping_llm.hf.modeling import PingGPTForCausalLM, PingGPTModel",
}


def write_remote_code(folder: str | os.PathLike[str]) -> None:
    """Two files of one import each, so that a folder and the package can never disagree."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, line in _FILES.items():
        write_atomically(Path(folder) / f"{name}.py", f"{_HEAD}\n\n{line}  # noqa: F401\n")
