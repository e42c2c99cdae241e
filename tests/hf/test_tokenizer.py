"""PingTokenizer does what transformers expects of a tokenizer, and no token is lost on the way."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ping_llm.data import tokenization as tk
from ping_llm.hf.tokenization import PingTokenizer

PING = "src=192.0.2.1 dst=198.51.100.7 time=2026-01-04T12:00:00Z rtt=12.5ms"
LONGER = f"{PING}\nsrc=192.0.2.1 dst=2001:db8::1 fail"


@pytest.fixture(scope="module")
def tokenizer() -> PingTokenizer:
    return PingTokenizer()


def test_a_measurement_is_its_tokens_and_nothing_is_added(tokenizer):
    with_special, without = tokenizer(PING), tokenizer(PING, add_special_tokens=False)
    assert with_special["input_ids"] == without["input_ids"] == tokenizer.encode(PING)
    decoded = tk.decode(with_special["input_ids"])
    assert decoded == [tk.Decoded("192.0.2.1", 32, "198.51.100.7", 32, decoded[0].rtt_ms, 1_767_528_000)]
    assert round(decoded[0].rtt_ms, 2) == 12.5
    assert with_special["attention_mask"] == [1] * len(with_special["input_ids"])


def test_a_prompt_ends_with_the_role_that_is_open(tokenizer):
    assert tokenizer("src=192.0.2.1 dst=198.51.100.7 rtt=")["input_ids"][-1] == tk.RTT_START
    assert tokenizer("src=192.0.2.1 dst=198.51.100.7 rtt= ")["input_ids"][-1] == tk.RTT_START
    assert tokenizer(f"{PING}\n")["input_ids"][-1] == tk.MEASUREMENT_START


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 266), max_size=30))
def test_ids_survive_text_names_and_both(tokenizer, ids):
    assert tokenizer.encode(tokenizer.decode(ids)) == ids
    names = tokenizer.convert_ids_to_tokens(ids)
    assert tokenizer.convert_tokens_to_ids(names) == ids and tokenizer.convert_tokens_to_string(
        names
    ) == tokenizer.decode(ids)


def test_each_of_267_tokens_is_its_own_entry_of_the_vocabulary(tokenizer):
    vocabulary = tokenizer.get_vocab()
    assert len(tokenizer) == tokenizer.vocab_size == len(vocabulary) == tk.VOCAB_SIZE
    assert sorted(vocabulary.values()) == list(range(tk.VOCAB_SIZE))
    assert [tokenizer.convert_ids_to_tokens(i) for i in (0, 10, 11, 266)] == [
        *("<MEASUREMENT_START>", "<FAILED>", "<0x00>", "<0xff>")
    ]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 9)


def test_a_batch_is_padded_at_the_left(tokenizer):
    batch = tokenizer([LONGER, "src=192.0.2.1 dst=198.51.100.7 rtt="], padding=True, return_tensors="np")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    real = int(mask[1].sum())
    assert real == 12 and (mask[1, -real:] == 1).all() and (ids[1, :-real] == 9).all() and (mask[0] == 1).all()
    assert ids[1, -1] == tk.RTT_START
    assert tokenizer.decode(ids, skip_special_tokens=True) == [LONGER, "src=192.0.2.1 dst=198.51.100.7 rtt="]


def test_skipping_special_tokens_leaves_out_padding_and_the_start_that_ends(tokenizer):
    ids = tokenizer.encode(LONGER)
    assert tokenizer.decode([9, 9, *ids, 0, 0, 9], skip_special_tokens=True) == LONGER
    assert tokenizer.decode([*ids, 0, 9]) == f"{LONGER}\n<THROUGHPUT_START>"
    assert tokenizer.decode([0], skip_special_tokens=True) == ""
    assert tokenizer.decode(0) == "\n" and tokenizer.decode(np.array([0, 10])) == "fail"


def test_what_breaks_is_said_with_its_place(tokenizer):
    with pytest.raises(ValueError, match=r"^position 14: there is no 'dest=198.51.100.7'; fields are"):
        tokenizer("src=192.0.2.1 dest=198.51.100.7")
    with pytest.raises(ValueError, match=r"^'<SRC>' is no token; there are <MEASUREMENT_START> … "):
        tokenizer.convert_tokens_to_ids(["<SRC>"])
    with pytest.raises(ValueError, match=r"^token 0: 267, which is no token"):
        tokenizer.decode([267])
    with pytest.raises(ValueError, match=r"^267, which is no token"):
        tokenizer.convert_ids_to_tokens([267])
    with pytest.raises(ValueError, match="words by themselves"):
        tokenizer(["src=192.0.2.1", "fail"], is_split_into_words=True)


def test_a_text_that_is_too_long_is_cut_at_the_asked_side(tokenizer):
    ids = tokenizer.encode(LONGER)
    cut = PingTokenizer(truncation_side="left")(LONGER, truncation=True, max_length=20)["input_ids"]
    assert cut == ids[-20:] and tokenizer.encode(tokenizer.decode(cut)) == cut


def test_saved_loaded_and_saved_again_it_is_the_same(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    saved = PingTokenizer(model_max_length=512).save_pretrained(tmp_path / "first")
    assert {str(path) for path in (tmp_path / "first").iterdir()} <= set(saved)
    PingTokenizer.register_for_auto_class()
    again = AutoTokenizer.from_pretrained(tmp_path / "first", trust_remote_code=True)
    assert type(again) is PingTokenizer and again.model_max_length == 512 and again.padding_side == "left"
    assert again(LONGER).data == tokenizer(LONGER).data and again.get_vocab() == tokenizer.get_vocab()
    again.save_pretrained(tmp_path / "second")
    first, second = (
        {path.name: path.read_text() for path in (tmp_path / name).iterdir()} for name in ("first", "second")
    )
    assert first.keys() == second.keys() == {"tokenization_ping_llm.py", "tokenizer_config.json"}
    assert "from ping_llm.hf.tokenization import PingTokenizer" in second["tokenization_ping_llm.py"]
    assert json.loads(second["tokenizer_config.json"])["auto_map"]["AutoTokenizer"][0] == (
        "tokenization_ping_llm.PingTokenizer"
    )
