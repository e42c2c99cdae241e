"""Every number of the config is refused in one line if no run could use it, from a file and from the command line."""

from __future__ import annotations

import dataclasses
import typing

import pytest

from ping_llm.config import Config, config_from_dict, parse_config
from ping_llm.config.bounds import Bounds


def numbers(kind: type) -> list[tuple[str, str]]:
    """Dotted names and type names of the numbers of each section."""
    hints = typing.get_type_hints(Config)
    sections = {f.name: hints[f.name] for f in dataclasses.fields(Config) if dataclasses.is_dataclass(hints[f.name])}
    fields = [(f"{name}.", typing.get_type_hints(section)) for name, section in sections.items()] + [("", hints)]
    return [prefix + name for prefix, kinds in fields for name, found in kinds.items() if found is kind]


FLOATS, INTS = numbers(float), numbers(int)


def nested(name: str, value: object) -> dict:
    section, _, field = name.rpartition(".")
    return {section: {field: value}} if section else {field: value}


def test_all_numbers_are_tried():
    assert {"optim.muon_lr", "train.max_minutes", "model.softcap", "loss.rtt"} <= set(FLOATS) and len(FLOATS) >= 20
    assert {"seed", "train.total_steps", "model.n_embd"} <= set(INTS)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("name", FLOATS)
def test_a_number_that_is_not_finite_is_refused_in_one_line(tmp_path, name, value):
    message = f"^{name}={value} must be a finite number$".replace(".", r"\.")
    with pytest.raises(ValueError, match=message):
        config_from_dict(nested(name, value), "config.toml")
    config = tmp_path / "config.toml"
    config.write_text("")
    with pytest.raises(ValueError, match=message):
        parse_config([str(config), f"--{name.replace('_', '-')}={value}"], "ping-llm train")


@pytest.mark.parametrize("name", FLOATS + INTS)
def test_a_negative_number_is_refused_in_one_line(name):
    with pytest.raises(ValueError, match=rf"^{name}=-1(\.0)? must be (at least|between) [0-9]"):
        config_from_dict(nested(name, -1), "config.toml")


def test_a_bound_is_said_in_full():
    assert str(Bounds(0, 1)) == "between 0 and 1" and str(Bounds(64)) == "at least 64"
    with pytest.raises(ValueError, match=r"^seed=9223372036854775808 must be between 0 and 9223372036854775807$"):
        config_from_dict({"seed": 2**63}, "config.toml")


def test_deterministic_has_a_short_name(tmp_path):
    config = tmp_path / "config.toml"
    config.write_text("")
    for option in ("--deterministic", "--train.deterministic"):
        assert parse_config([str(config), option], "ping-llm train").train.deterministic
    assert not parse_config([str(config)], "ping-llm train").train.deterministic
    config.write_text("[train]\ndeterministic = true")
    assert parse_config([str(config)], "ping-llm train").train.deterministic


def test_windows_cannot_be_of_more_kinds_than_there_are():
    message = r"^data.mesh \+ data.synthetic = 1.1 must not exceed 1$"
    with pytest.raises(ValueError, match=message):
        config_from_dict({"data": {"mesh": 0.6, "synthetic": 0.5}}, "config.toml")


def test_short_windows_are_shorter_than_the_others_and_hold_any_measurement():
    config = config_from_dict({"model": {"seq_len": 64}, "data": {"short_windows": 3}}, "config.toml")
    assert config.place_tokens == 64 + 3 * 48
    with pytest.raises(
        ValueError, match=r"^data.short_len=65 must not exceed model.seq_len=64: such windows are short"
    ):
        config_from_dict({"model": {"seq_len": 64}, "data": {"short_windows": 1, "short_len": 65}}, "config.toml")
    with pytest.raises(ValueError, match=r"^data.short_len=45 must be at least 46$"):
        config_from_dict({"data": {"short_windows": 1, "short_len": 45}}, "config.toml")
