"""A TOML file and the command line in, one tree of frozen dataclasses out. Defaults < file < command line."""

from ping_llm.config.model import ModelConfig
from ping_llm.config.reading import (
    config_from_dict,
    config_to_dict,
    differing_fields,
    from_dict,
    load_config,
    parse_config,
    read_toml,
)
from ping_llm.config.sections import (
    FIELDS,
    Config,
    DataConfig,
    LossConfig,
    OptimConfig,
    TrainConfig,
)

__all__ = [
    "FIELDS",
    "Config",
    "DataConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "TrainConfig",
    "config_from_dict",
    "config_to_dict",
    "differing_fields",
    "from_dict",
    "load_config",
    "parse_config",
    "read_toml",
]
