from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from serve.ingress.detokenize import Detokenizer, DetokenizerFactory, TableDetokenizer, WindowDetokenizer
from tests.unit.ingress.tiny_model import CORPUS, train_tokenizer

TEXTS = st.text(max_size=60) | st.lists(
    st.sampled_from([*"aé世😀👍🏽 ▁\n", "the ", " fox", "<|eos|>", "<think é>"])
).map("".join)


def sentencepiece(*, strip: bool) -> Tokenizer:
    """A tokenizer as Llama 2 (strip) and Gemma (no strip) have: marks for spaces, bytes for what is unknown."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdefoxthé世",
        "▁t",
        "▁th",
        "▁the",
    ]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *steps] if strip else steps)
    last = [decoders.Strip(" ", 1, 0)] if strip else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last])
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return tokenizer


def metaspace() -> Tokenizer:
    pieces = [("<unk>", 0.0), ("▁", -1.0), ("▁the", -2.0), *((char, -3.0) for char in "abcdefoxthé世😀")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def wordpiece() -> Tokenizer:
    pieces = ["[UNK]", "the", "fox", "##es", "##y", "!", "jump", "##s"]
    tokenizer = Tokenizer(models.WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return tokenizer


MAKERS = {
    "byte-level": train_tokenizer,
    "byte-fallback with strip": lambda: sentencepiece(strip=True),
    "byte-fallback": lambda: sentencepiece(strip=False),
    "metaspace": metaspace,
    "wordpiece": wordpiece,
}


@cache
def tokenizer_of(name: str) -> tuple[Tokenizer, DetokenizerFactory]:
    tokenizer = MAKERS[name]()
    return tokenizer, DetokenizerFactory(tokenizer)


def id_of(tokenizer: Tokenizer, piece: str) -> int:
    token_id = tokenizer.token_to_id(piece)
    assert token_id is not None
    return int(token_id)


def byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    return [id_of(tokenizer, f"<0x{byte:02X}>") for byte in data]


def in_pieces(detokenizer: Detokenizer, token_ids: list[int], sizes: list[int]) -> list[str]:
    """Feed the tokens in groups of these sizes, then one by one; the last piece is what flush says."""
    pieces, start = [], 0
    for size in sizes:
        pieces.append(detokenizer.feed(token_ids[start : start + size]))
        start += size
    pieces.extend(detokenizer.feed([token_id]) for token_id in token_ids[start:])
    return [*pieces, detokenizer.flush()]


@pytest.mark.parametrize("name", MAKERS)
@given(text=TEXTS, sizes=st.lists(st.integers(0, 5), max_size=5), skip=st.booleans())
def test_pieces_of_a_text_join_to_what_the_tokenizer_decodes(
    name: str, text: str, sizes: list[int], skip: bool
) -> None:
    tokenizer, factory = tokenizer_of(name)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    pieces = in_pieces(factory.make(skip_special_tokens=skip), ids, sizes)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)


@given(ids=st.lists(st.integers(0, 520), max_size=40), sizes=st.lists(st.integers(0, 5), max_size=5))
def test_any_byte_level_tokens_decode_as_the_tokenizer_does(ids: list[int], sizes: list[int]) -> None:
    tokenizer, factory = tokenizer_of("byte-level")
    assert "".join(in_pieces(factory.make(), ids, sizes)) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", MAKERS)
@given(data=st.data())
def test_any_tokens_decode_to_one_text_however_they_are_grouped(name: str, data: st.DataObject) -> None:
    tokenizer, factory = tokenizer_of(name)
    ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() + 3), max_size=40))
    prompt = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=10))
    sizes = data.draw(st.lists(st.integers(0, 5), max_size=8))
    one_by_one = in_pieces(factory.make(prompt=prompt), ids, [])
    assert "".join(in_pieces(factory.make(prompt=prompt), ids, sizes)) == "".join(one_by_one)


@given(text=st.text(alphabet="é世😀👍🏽", min_size=1, max_size=20))
def test_no_piece_of_valid_text_has_half_a_character(text: str) -> None:
    for name in ("byte-level", "byte-fallback"):
        tokenizer, factory = tokenizer_of(name)
        pieces = in_pieces(factory.make(), tokenizer.encode(text, add_special_tokens=False).ids, [])
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_appears_with_its_last_byte() -> None:
    tokenizer, factory = tokenizer_of("byte-fallback")
    ids = byte_ids(tokenizer, "😀".encode())
    assert in_pieces(factory.make(), ids, []) == ["", "", "", "😀", ""]


def test_half_a_character_at_the_end_is_shown_as_replacement() -> None:
    tokenizer, factory = tokenizer_of("byte-fallback")
    ids = byte_ids(tokenizer, "😀".encode()[:3])
    assert in_pieces(factory.make(), ids, []) == ["", "", "", "\ufffd"]


def test_bytes_that_are_not_utf8_never_hold_back_what_follows() -> None:
    tokenizer, factory = tokenizer_of("byte-fallback")
    ids = [*byte_ids(tokenizer, b"\xff"), id_of(tokenizer, "a")]
    assert in_pieces(factory.make(), ids, []) == ["\ufffd", "a", ""]


def test_the_space_before_the_first_word_is_kept_after_a_prompt_and_stripped_without() -> None:
    tokenizer, factory = tokenizer_of("byte-fallback with strip")
    the, a, bos = (id_of(tokenizer, piece) for piece in ("▁the", "a", "<s>"))
    assert "".join(in_pieces(factory.make(prompt=[bos, a]), [the], [])) == " the"
    assert "".join(in_pieces(factory.make(prompt=[bos]), [the], [])) == "the"
    assert "".join(in_pieces(factory.make(prompt=[]), [the, the], [])) == "the the"


def test_a_prompt_that_ends_within_a_character_is_completed() -> None:
    tokenizer, factory = tokenizer_of("byte-fallback")
    ids = byte_ids(tokenizer, "世".encode())
    assert "".join(in_pieces(factory.make(prompt=ids[:2]), ids[2:], [])) == "世"


def test_wordpiece_continues_words_of_the_prompt() -> None:
    tokenizer, factory = tokenizer_of("wordpiece")
    fox, es, jump = (id_of(tokenizer, piece) for piece in ("fox", "##es", "jump"))
    assert in_pieces(factory.make(prompt=[fox]), [es, jump], []) == ["es", " jump", ""]


def test_tokenizers_that_concatenate_are_recognised() -> None:
    kinds = {name: type(tokenizer_of(name)[1].make()) for name in MAKERS}
    assert kinds.pop("wordpiece") is WindowDetokenizer
    assert set(kinds.values()) == {TableDetokenizer}


def test_special_tokens_are_shown_when_asked_for() -> None:
    _, factory = tokenizer_of("byte-level")
    ids = [3, *tokenizer_of("byte-level")[0].encode(CORPUS[0], add_special_tokens=False).ids, 2]
    assert "".join(in_pieces(factory.make(), ids, [])) == CORPUS[0]
    assert "".join(in_pieces(factory.make(skip_special_tokens=False), ids, [])) == f"<|user|>{CORPUS[0]}<|eos|>"
