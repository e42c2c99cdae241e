"""Generation by transformers: held to the grammar, the same tokens as our own, measurements in a pipeline."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import make_row
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import ROOT
from small_exports import KINDS, small_export, small_gpt, small_model
from transformers import LogitsProcessorList, pipeline

from ping_llm.config import DataConfig
from ping_llm.data import tokenization as tk
from ping_llm.data.times import LAST_TIME_S
from ping_llm.data.windows import encode_windows, sample_window
from ping_llm.hf.generation import GrammarLogitsProcessor
from ping_llm.hf.text import from_text, to_text
from ping_llm.hf.tokenization import PingTokenizer
from ping_llm.inference.engine import Reader
from ping_llm.inference.generate import generate
from ping_llm.inference.grammar import Grammar, follow
from ping_llm.model.fields import read_fields
from ping_llm.model.legal import legal_states, legal_table, place_table

PROMPT = "src=192.0.2.1 dst=198.51.100.7"
TIMED = f"{PROMPT} time=2026-01-04T12:00:00Z rtt=12.5ms\n"


def masks(processor, rows, width=tk.VOCAB_SIZE) -> np.ndarray:
    """What is legal after rows (B, T), as (B, V)."""
    scores = torch.zeros(len(rows), width)
    return torch.isfinite(processor(torch.as_tensor(rows), scores)).numpy()


def walk(rng, tokens) -> list[int]:
    grammar, walked = Grammar(1, whole_addresses=False, last_time_s=LAST_TIME_S), []
    while len(walked) < tokens:
        legal = np.flatnonzero(grammar.legal()[0])
        roles = legal[legal < tk.BYTE_0]
        walked.append(int(rng.choice(roles if len(roles) and rng.random() < 0.4 else legal)))
        grammar.advance(np.array(walked[-1:]))
    return walked


def legal_after(tokens, **options) -> np.ndarray:
    grammar = Grammar(1, last_time_s=LAST_TIME_S, **options)
    follow(grammar, tokens)
    return grammar.legal()[0]


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 4), st.sampled_from([0, 9]))
def test_each_mask_is_that_of_the_grammar_after_the_real_tokens_of_each_row(seed, count, padding):
    """Rows of unlike lengths, padded at the left, step by step; then in another order, some twice, as beams are."""
    rng = np.random.default_rng(seed)
    walks = [walk(rng, int(rng.integers(12, 45))) for _ in range(count)]
    prompts = [int(rng.integers(1, len(one) - 10)) for one in walks]
    processor = GrammarLogitsProcessor(continue_prefix=True)
    wide = max(prompts)
    for more in range(10):
        rows = [[padding] * (wide - prompt) + one[: prompt + more] for one, prompt in zip(walks, prompts, strict=True)]
        expected = [legal_after(one[: p + more], whole_addresses=False) for one, p in zip(walks, prompts, strict=True)]
        assert (masks(processor, rows) == expected).all()
    beams = rng.integers(count, size=5)
    rows = [rows[beam] + [walks[beam][prompts[beam] + 9]] for beam in beams]
    assert (
        masks(processor, rows) == [legal_after(walks[b][: prompts[b] + 10], whole_addresses=False) for b in beams]
    ).all()


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32))
def test_what_it_allows_the_mask_of_models_allows_and_windows_of_training_are_allowed(seed):
    window = sample_window(make_row(50, seed % 7), DataConfig(), 120, np.random.default_rng(seed))
    line = encode_windows([window], 120)[0].astype(np.int64)
    line = line[line != tk.PADDING]
    features, _ = read_fields(torch.from_numpy(line[None]))
    of_model = legal_table(tk.VOCAB_SIZE)[legal_states(features, place_table())[0]].numpy()  # (T, V)
    processor = GrammarLogitsProcessor(continue_prefix=True)
    for at in range(1, len(line)):
        (legal,) = masks(processor, line[None, :at])
        assert legal[line[at]] and (of_model[at - 1] | ~legal).all()


def test_rows_that_ended_take_padding_of_either_kind():
    ended, going = from_text(f"{PROMPT} fail"), from_text(f"{PROMPT} time=")
    for padding in (0, 9):
        processor = GrammarLogitsProcessor(continue_prefix=True)
        for more in range(5):
            rows = [ended + [0, padding, padding, padding][:more], going + [11, 11, 11, 11][:more]]
            legal = masks(processor, rows)
            assert (legal[1] == legal_after(rows[1])).all() and legal.any(axis=1).all()


def test_a_prefix_of_the_prompt_is_followed_by_a_field_unless_it_is_to_be_continued():
    prompt = [from_text("src=192.0.2.0/24"), from_text("dst=198.51.0.0/16 src=::/0")[-4:]]
    (closed,), (open_,) = (masks(GrammarLogitsProcessor(continue_prefix=c), prompt[:1]) for c in (False, True))
    assert not closed[tk.BYTE_0 :].any() and closed[tk.DST_IPV4]
    assert open_[tk.BYTE_0 :].all() and (open_[: tk.BYTE_0] == closed[: tk.BYTE_0]).all()
    (needed,) = masks(GrammarLogitsProcessor(), [from_text("dst=0.0.0.0/0")])  # a destination has a byte at least
    assert needed[tk.BYTE_0 :].all() and not needed[: tk.BYTE_0].any()
    (whole,) = masks(GrammarLogitsProcessor(whole_addresses=True), [from_text("src=192.0.2.0/24")])
    assert whole[tk.BYTE_0 :].all() and not whole[: tk.BYTE_0].any()


def test_scores_of_rows_that_pad_a_vocabulary_have_no_chance():
    legal = masks(GrammarLogitsProcessor(), [from_text(PROMPT)], width=320)
    assert legal[0, : tk.VOCAB_SIZE].any() and not legal[0, tk.VOCAB_SIZE :].any()


def test_a_prompt_that_breaks_the_grammar_is_refused_and_so_is_another_way_on():
    with pytest.raises(ValueError, match=r"^the prompt breaks the grammar at token 11: expected .*, found SRC_IPV4"):
        masks(GrammarLogitsProcessor(), [from_text(f"{PROMPT} src=192.0.2.1")])
    processor, prompt = GrammarLogitsProcessor(), from_text(f"{PROMPT} rtt=")
    masks(processor, [prompt])
    with pytest.raises(ValueError, match=r"^row 0 went on with FAILED, which the grammar does not allow there"):
        masks(processor, [[*prompt, tk.FAILED]])


@pytest.fixture(scope="module", params=KINDS)
def models(request):
    gpt = small_gpt(**KINDS[request.param])
    return gpt, small_model(gpt)


def held(**options) -> dict:
    return {"logits_processor": LogitsProcessorList([GrammarLogitsProcessor(**options)])}


def test_greedy_tokens_are_those_of_our_own_generation(models):
    gpt, model = models
    reader = Reader(gpt, torch.device("cpu"))
    for text in (PROMPT, f"{PROMPT} rtt=", "src=192.0.2.1 rtt=3ms", TIMED + PROMPT):
        prompt = from_text(text)
        own = generate(reader, 1, temperature=0, prompt_tokens=prompt, whole_addresses=True).to_pylist()[0]
        ids = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=60, **held(whole_addresses=True))
        theirs = tk.decode(from_text(PingTokenizer().decode(ids[0], skip_special_tokens=True)))[-1]
        assert (theirs.src, theirs.dst, theirs.rtt_ms) == (own["src_addr"], own["dst_addr"], own["rtt"])
        assert theirs.time_s == (own["event_time"] and own["event_time"].timestamp())


@pytest.mark.parametrize("options", [{"do_sample": True, "num_return_sequences": 8}, {"num_beams": 4}])
def test_whatever_is_drawn_is_whole_measurements(models, options):
    _, model = models
    tokenizer, prompts = PingTokenizer(), [f"{TIMED}{PROMPT}", "src=192.0.2.1", "src=192.0.0.0/16 time="]
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    torch.manual_seed(0)
    ids = model.generate(**batch, max_new_tokens=60, **({"do_sample": False} | options), **held())
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    copies = options.get("num_return_sequences", 1)
    for text, prompt in zip(texts, [prompt for prompt in prompts for _ in range(copies)], strict=True):
        grammar = Grammar(1, whole_addresses=False)
        follow(grammar, tokenizer.encode(text))
        assert text.startswith(prompt) and grammar.legal()[0, tk.MEASUREMENT_START], text


def test_without_it_a_model_that_learned_nothing_breaks_the_grammar():
    model = small_model(small_gpt())
    torch.manual_seed(0)
    ids = model.generate(torch.tensor([from_text(PROMPT)]), do_sample=True, max_new_tokens=40, num_return_sequences=8)
    broken = 0
    for row in ids.tolist():
        assert from_text(to_text(row)) == row
        try:
            follow(Grammar(1, whole_addresses=False), row)
        except ValueError:
            broken += 1
    assert broken >= 7


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline_completes_measurements_one_by_one_and_in_batches(kind, tmp_path):
    folder = small_export(tmp_path, small_gpt(**KINDS[kind]))
    pipe = pipeline("text-generation", str(folder), trust_remote_code=True, device="cpu")
    prompts = [f"{PROMPT} rtt=", PROMPT, f"{TIMED}{PROMPT} rtt=", ""]
    options = {"max_new_tokens": 60, "do_sample": False}
    alone = [pipe(prompt, **options, **held(whole_addresses=True))[0]["generated_text"] for prompt in prompts]
    for prompt, text in zip(prompts, alone, strict=True):
        assert text.startswith(prompt) and "<" not in text and not text.endswith("\n")
        assert len(tk.decode(from_text(text))) == prompt.count("\n") + 1
        assert text == PingTokenizer().decode(from_text(text))  # nothing is spelt as no one would
    assert pipe.tokenizer.padding_side == "left"
    together = pipe(prompts[:3], batch_size=3, **options, **held(whole_addresses=True))
    assert [texts[0]["generated_text"] for texts in together] == alone[:3]


@pytest.mark.slow
def test_tokenizer_and_pipeline_of_a_folder_work_in_a_fresh_offline_process(tmp_path):
    folder = small_export(tmp_path / "model", small_gpt(**KINDS["own"]))
    script = f"""
import json, sys
from transformers import AutoTokenizer, pipeline
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = tokenizer({TIMED!r})["input_ids"]
about = [type(tokenizer).__name__, ids, tokenizer.decode(ids), tokenizer.padding_side, tokenizer.model_max_length]
pipe = pipeline("text-generation", sys.argv[1], trust_remote_code=True)
print(json.dumps([about, pipe({PROMPT + " rtt="!r}, do_sample=False)]))
"""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        env=os.environ | offline, capture_output=True, text=True, cwd=tmp_path, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    about, answers = json.loads(done.stdout.splitlines()[-1])
    assert about == ["PingTokenizer", from_text(TIMED), TIMED, "left", 128]
    assert answers[0]["generated_text"].startswith(f"{PROMPT} rtt=") and "ms" in answers[0]["generated_text"]
