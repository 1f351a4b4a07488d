"""Three tokenizer libraries behind one face."""

import json
import sysconfig
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from data.config import TokenizerKind
from data.errors import DataError
from data.install import train
from data.tokenizer import open_file, open_tokenizer

STDLIB = Path(sysconfig.get_paths()["stdlib"])
MODULES = sorted(file for name in ("json", "asyncio", "encodings") for file in (STDLIB / name).glob("*.py"))
AWKWARD = [
    "",
    " ",
    "  two  spaces  ",
    "\n\n\tdef f():\r\n\t\treturn  1 \n",
    "\x00\x0b\x0c\x1f\x7f\x85\u2028\ufeff",
    "\u2581 a\u2581\u2581b \u2581",
    "\u2585 <unk> </s> <0x0A> <|endoftext|>",
    "é ß 漢字 😀 e\u0301 ﬁ Ⅷ",
]


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    path.write_bytes(train((file.read_text() for file in MODULES), vocab_size=800))
    return path


@pytest.fixture(scope="module")
def hugging_face_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizers") / "some.json"
    model = tokenizers.ByteLevelBPETokenizer()
    model.train_from_iterator(["def f(): return 1"] * 3, vocab_size=300, special_tokens=["<|endoftext|>"])
    model.enable_truncation(3)
    model.save(str(path))
    return path


@pytest.fixture(scope="module")
def exact(sentencepiece_file):
    return open_file(sentencepiece_file, kind=TokenizerKind.sentencepiece, eos=None)


def test_a_trained_sentencepiece_gives_back_every_module_exactly(exact):
    files = [*MODULES, *sorted(STDLIB.glob("*.py"))[:40]]
    texts = [file.read_bytes().decode() for file in files]
    encoded = exact.encode_batch(texts, threads=2)
    assert [exact.decode(tokens) for tokens in encoded] == texts
    assert encoded[3] == exact.encode(texts[3])
    assert sum(map(len, texts)) > 2 * sum(map(len, encoded))


@pytest.mark.parametrize("text", AWKWARD)
def test_a_trained_sentencepiece_gives_back_awkward_text_exactly(exact, text):
    assert exact.decode(exact.encode(text)) == text
    assert exact.eos not in exact.encode(text)


@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_a_trained_sentencepiece_gives_back_any_text_exactly(exact, text):
    assert exact.decode(exact.encode(text)) == text


@pytest.mark.parametrize("text", AWKWARD)
def test_hugging_face_and_tiktoken_give_back_text_and_read_no_control_token(hugging_face_file, byte_ranks, text):
    for path, kind in ((hugging_face_file, TokenizerKind.tokenizers), (byte_ranks, TokenizerKind.tiktoken)):
        tokenizer = open_file(path, kind=kind, eos="<|endoftext|>")
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
        assert tokenizer.eos not in tokens
        assert tokenizer.encode_batch([text, "x"], threads=2) == [tokens, tokenizer.encode("x")]


def test_eos_and_numbers_beyond_the_vocabulary_can_be_decoded(exact, byte_ranks):
    tiktoken = open_file(byte_ranks, kind=TokenizerKind.tiktoken, eos=None)
    for tokenizer in (exact, tiktoken):
        tokens = [*tokenizer.encode("ab"), tokenizer.eos, tokenizer.vocab_size, *tokenizer.encode("c")]
        assert tokenizer.decode(tokens) == "ab\ufffdc"


def test_eos_is_the_named_token_or_the_declared_one(hugging_face_file, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(hugging_face_file.read_bytes())
    with pytest.raises(DataError, match=r"tokenizer\.eos=None: must name the token of .*tokenizer\.json"):
        open_file(path, kind=TokenizerKind.tokenizers, eos=None)
    settings = tmp_path / "tokenizer_config.json"
    for declared in ("<|endoftext|>", {"content": "<|endoftext|>"}):
        settings.write_text(json.dumps({"eos_token": declared}))
        tokenizer = open_file(path, kind=TokenizerKind.tokenizers, eos=None)
        assert tokenizer.eos == 0
        assert tokenizer.files == [path, settings]
    assert open_file(path, kind=TokenizerKind.tokenizers, eos="a").eos == tokenizer.encode("a")[0]


def test_a_sentencepiece_with_a_space_before_every_text_is_left_as_it_is(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d"] * 9),
        model_prefix=str(tmp_path / "plain"),
        vocab_size=270,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = open_file(tmp_path / "plain.model", kind=TokenizerKind.sentencepiece, eos=None)
    assert tokenizer.decode(tokenizer.encode("a b\u2581c")) == "a b c"


@pytest.mark.parametrize("kind", list(TokenizerKind))
def test_a_file_that_is_no_tokenizer_is_refused_by_name(tmp_path, kind):
    path = tmp_path / "broken"
    with pytest.raises(DataError, match=r"broken: the tokenizer cannot be read: No such file"):
        open_file(path, kind=kind, eos=None)
    path.write_text("broken")
    with pytest.raises(DataError, match=r"broken: is no "):
        open_file(path, kind=kind, eos=None)


@pytest.mark.parametrize("kind", list(TokenizerKind))
def test_an_eos_that_is_not_in_the_tokenizer_is_refused(sentencepiece_file, hugging_face_file, byte_ranks, kind):
    path = {"sentencepiece": sentencepiece_file, "tokenizers": hugging_face_file, "tiktoken": byte_ranks}[kind.value]
    with pytest.raises(DataError, match=r"tokenizer\.eos=<nothing>: must name the token"):
        open_file(path, kind=kind, eos="<nothing>")


def test_tiktoken_ranks_need_their_settings(byte_ranks):
    settings = byte_ranks.with_name(byte_ranks.name + ".json")
    settings.write_text('{"pattern": "."}')
    with pytest.raises(DataError, match=r"tiktoken\.json: must hold pattern and special_tokens"):
        open_file(byte_ranks, kind=TokenizerKind.tiktoken, eos=None)


def test_shards_carry_their_tokenizer_and_notice_another(make_shards, texts, tmp_path):
    folder = make_shards(texts).folder
    tokenizer = open_tokenizer(folder)
    assert tokenizer.encode("ab") == [97, 98] and tokenizer.eos == 256 and tokenizer.vocab_size == 257
    assert all(file.parent == tmp_path / "shards" for file in tokenizer.files)
    (tmp_path / "shards" / "tokenizer.tiktoken").write_text("YQ== 0\n")
    with pytest.raises(DataError, match=r"is not the tokenizer that the shards beside it were made with"):
        open_tokenizer(folder)
