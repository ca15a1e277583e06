import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tests.folovllm.serving_fixtures import EOS, PARAGRAPH, make_backend
from tokenizers import decoders, models, normalizers, trainers

from folovllm.engine.detokenizer import REPLACEMENT, IncrementalDetokenizer, WindowDecoder
from folovllm.sampling_params import SamplingParams
from folovllm.transformers_utils.tokenizer import Tokenizer

TOKENIZER = Tokenizer(make_backend(), special_tokens={"eos_token": EOS})
texts = st.text(st.characters(codec="utf-8"), max_size=40) | st.text(st.sampled_from("東京🎉é ab."), max_size=40)


def run(token_ids: list[int], **options: object) -> tuple[list[str], str | None, int]:
    """Pieces released, the stop string that ended it, and how many tokens that took."""
    params = SamplingParams.from_options(dict(options))
    detokenizer = IncrementalDetokenizer.create(TOKENIZER, params, [])
    pieces = []
    for number, token_id in enumerate(token_ids, 1):
        text, stop = detokenizer.update(token_id)
        pieces.append(text)
        if stop is not None:
            return pieces, stop, number
    return [*pieces, detokenizer.finish()], None, len(token_ids)


@given(st.lists(st.integers(0, TOKENIZER.vocab_size + 3), max_size=40), st.booleans())
@example([0, 1, 2], True)
def test_text_of_any_tokens_equals_decoding_them_at_once(token_ids: list[int], skip: bool) -> None:
    pieces, _, _ = run(token_ids, skip_special_tokens=skip)
    assert "".join(pieces) == TOKENIZER.decode(token_ids, skip_special_tokens=skip)


@given(texts)
def test_no_replacement_character_inside_a_stream_of_valid_text(text: str) -> None:
    pieces, _, _ = run(TOKENIZER.encode(text))
    assert "".join(pieces) == text
    assert text.count(REPLACEMENT) == sum(piece.count(REPLACEMENT) for piece in pieces)


def test_character_of_several_tokens_appears_with_its_last_token() -> None:
    pieces, _, _ = run(TOKENIZER.encode("🦜"))
    assert len(pieces) > 2  # its bytes were never seen together
    assert pieces == [*[""] * (len(pieces) - 2), "🦜", ""]


def test_unfinished_character_at_the_end_reads_as_replacement() -> None:
    pieces, _, _ = run(TOKENIZER.encode("a🦜")[:-1])
    assert "".join(pieces) == "a" + REPLACEMENT


def naive_stop(token_ids: list[int], stops: list[str], min_tokens: int) -> tuple[str, str | None]:
    for number in range(1, len(token_ids) + 1):
        text = TOKENIZER.decode(token_ids[:number]).rstrip(REPLACEMENT)
        found = [(text.find(stop), index) for index, stop in enumerate(stops) if stop in text]
        if number > min_tokens and found:
            begin, index = min(found)
            return text[:begin], stops[index]
    return TOKENIZER.decode(token_ids), None


@given(
    st.text(st.sampled_from("abé東 "), max_size=30),
    st.lists(st.text(st.sampled_from("abé東 "), min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_strings_cut_where_a_search_after_each_token_finds_them(text: str, stops: list[str]) -> None:
    token_ids = TOKENIZER.encode(text)
    pieces, stop, _ = run(token_ids, stop=stops)
    assert ("".join(pieces), stop) == naive_stop(token_ids, stops, 0)


def test_stop_string_across_tokens_is_never_shown_in_part() -> None:
    token_ids = [i for char in "one STOP two" for i in TOKENIZER.encode(char)]
    pieces, stop, number = run(token_ids, stop=["STOP"])
    assert "".join(pieces) == "one "
    assert stop == "STOP"
    assert number == len("one STOP")


def test_held_back_text_is_released_when_it_turns_out_to_be_no_stop_string() -> None:
    token_ids = [i for char in "STO!" for i in TOKENIZER.encode(char)]
    pieces, stop, _ = run(token_ids, stop=["STOP"])
    assert pieces == ["", "", "", "STO!", ""]
    assert stop is None


def test_held_back_text_is_released_at_the_end() -> None:
    pieces, stop, _ = run(TOKENIZER.encode("one STO"), stop=["STOP"])
    assert "".join(pieces) == "one STO"
    assert stop is None


def test_include_stop_str_keeps_it_and_nothing_after_it() -> None:
    token_ids = TOKENIZER.encode("blocks are keys")
    pieces, stop, _ = run(token_ids, stop=["s ar"], include_stop_str_in_output=True)
    assert "".join(pieces) == "blocks ar"
    assert stop == "s ar"


def test_stop_string_within_min_tokens_is_text() -> None:
    token_ids = [i for char in "a.b.c" for i in TOKENIZER.encode(char)]
    pieces, stop, number = run(token_ids, stop=["."], min_tokens=2, max_tokens=9)
    assert ("".join(pieces), stop, number) == ("a.b", ".", 4)


@pytest.fixture(scope="module")
def sentencepiece_like() -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", "<s>", *bytes_tokens], show_progress=False)
    backend.train_from_iterator([PARAGRAPH.replace(" ", "▁")], trainer)
    return Tokenizer(backend)


def test_other_vocabularies_are_decoded_behind_a_window(sentencepiece_like: Tokenizer) -> None:
    text = "the second prompt finds  two blocks. 東京 naïve"
    token_ids = sentencepiece_like.encode(text)
    assert not sentencepiece_like.is_byte_level
    decoder = WindowDecoder(sentencepiece_like, skip_special_tokens=True)
    assert "".join([*map(decoder.step, token_ids), decoder.flush()]) == text


def test_window_keeps_the_space_between_prompt_and_answer(sentencepiece_like: Tokenizer) -> None:
    prompt, answer = sentencepiece_like.encode("the cache"), sentencepiece_like.encode("is full")
    decoder = WindowDecoder(sentencepiece_like, skip_special_tokens=True, prompt_token_ids=prompt)
    assert "".join(map(decoder.step, answer)) == " is full"
