"""The classes of this model are those of the installed package: pip install ping-llm[hf]"""

from ping_llm.hf.configuration import PingGPTConfig  # noqa: F401
