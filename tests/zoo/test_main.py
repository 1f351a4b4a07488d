"""``python -m zoo``: all models in a table, one in depth, both for programs, and the page that is made of them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from models import PUBLISHED, SHIPPED, compose

from zoo import catalogue, page
from zoo.__main__ import main
from zoo.card import amount, gigaflops, kibibytes
from zoo.count import flops_per_token, kv_bytes_per_token, parameters

ROOT = Path(__file__).parents[2]
STAND_INS = {
    "gpt4o_standin": ("GPT-4o", "chameleon_7b"),
    "gpt4_standin": ("GPT-4", "mixtral_8x7b"),
    "claude35_standin": ("Claude 3.5 Sonnet", "mixtral_8x7b"),
    "gemini_standin": ("Gemini 1.5 Pro", "gemma3_27b"),
}


def said(capsys, monkeypatch, *words, columns=160):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(words) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", [160, 100, 80])
def test_the_table_has_every_model_and_fits(capsys, monkeypatch, columns):
    lines = said(capsys, monkeypatch, columns=columns).splitlines()
    first_words = {line.split()[0] for line in lines if line.strip()}
    assert len(PUBLISHED) == 41
    assert {*PUBLISHED, *STAND_INS, "chameleon_34b"} <= first_words
    assert "qwen3_tiny" not in first_words
    assert max(map(len, lines)) <= columns
    row = next(line for line in lines if line.split()[:1] == ["deepseek_v3_671b"])
    assert all(each in row for each in ("671.0B", "37.6B", "68.6 KiB", "261 G"))
    text = " ".join(" ".join(lines).split())
    assert "arXiv" in text and "training" in text


@pytest.fixture(scope="module")
def counted():
    """Of each model what the table must say: parameters, active, cache, FLOPs."""
    numbers = {}
    for name in SHIPPED:
        config = compose(name)
        cache, flops = kv_bytes_per_token(config, value_bytes=2), flops_per_token(config, seq_len=4096).total
        numbers[name] = [*map(amount, (parameters(config).total, parameters(config).active))]
        numbers[name] += [kibibytes(cache), gigaflops(flops)]
    return numbers


@pytest.mark.parametrize("columns", [130, 95, 94, 74, 73, 60, 20, 1, 0])
def test_the_table_has_every_number_however_narrow(capsys, monkeypatch, counted, columns):
    out = said(capsys, monkeypatch, "--tiny", columns=columns)
    assert max(map(len, out.splitlines())) <= (columns or 80)
    out = "".join(out.split())
    for name, numbers in counted.items():
        in_lines = zip(("parameters", "active", "cache/token", "trainingFLOPs/token"), numbers, strict=True)
        rows = [name + "".join(numbers), name + "".join(heading + number for heading, number in in_lines)]
        assert any(row.replace(" ", "") in out for row in rows), name
    assert all(f"{name}unpublished" in out or f"{name}parametersunpublished" in out for name in STAND_INS)


def test_a_narrow_table_is_a_line_for_each_number(capsys, monkeypatch):
    lines = said(capsys, monkeypatch, columns=40).splitlines()
    at = lines.index("llama4_scout")
    numbers = ["parameters 107.8B", "active 17.2B", "cache/token 192.0 KiB", "training FLOPs/token 103 G"]
    assert lines[at + 1 : at + 5] == numbers and lines[at + 5].startswith("Three layers")


@pytest.mark.parametrize("columns", [60, 59, 20, 1, 0])
@pytest.mark.parametrize("name", ["deepseek_v3_671b", "gpt4o_standin"])
def test_a_card_has_every_word_however_narrow(capsys, monkeypatch, name, columns):
    def characters(width):
        out = said(capsys, monkeypatch, name, columns=width)
        assert max(map(len, out.splitlines())) <= (width or 80)
        return sorted("".join(out.split()))

    assert characters(columns) == characters(1000)


def test_small_sizes_are_listed_on_request(capsys, monkeypatch):
    out = said(capsys, monkeypatch, "--tiny")
    assert all(name in out for name in SHIPPED)


def test_numbers_for_programs_are_those_of_count(capsys, monkeypatch):
    listed = {each["name"]: each for each in json.loads(said(capsys, monkeypatch, "--json"))}
    assert set(listed) == set(PUBLISHED)
    for name, numbers in listed.items():
        config = compose(name)
        assert numbers["parameters"] == parameters(config).total
        assert numbers["active_parameters"] == parameters(config).active
        assert numbers["mtp_parameters"] == parameters(config).mtp
        assert numbers["kv_bytes_per_token"] == kv_bytes_per_token(config, value_bytes=2)
        assert numbers["flops_per_token"] == flops_per_token(config, seq_len=4096).total
        assert numbers["unusual"] and numbers["source"] and numbers["stand_in"] is None


def test_one_model_for_programs_is_one_object(capsys, monkeypatch):
    numbers = json.loads(said(capsys, monkeypatch, "llama3_8b", "--json"))
    assert (numbers["name"], numbers["parameters"]) == ("llama3_8b", 8_030_261_248)
    unpublished = json.loads(said(capsys, monkeypatch, "gpt4o_standin", "--json"))
    assert (unpublished["model"], unpublished["stand_in"]) == ("GPT-4o", "chameleon_7b")
    keys = ("parameters", "active_parameters", "kv_bytes_per_token", "flops_per_token")
    assert [unpublished[key] for key in keys] == [None] * 4


def test_a_card_tells_parts_pattern_routing_and_how_to_train(capsys, monkeypatch):
    card = said(capsys, monkeypatch, "deepseek_v3_671b")
    words = [
        "3 dense, 58 moe", "R1 is the same network", "256 experts", "4 of 8 groups", "yarn scaling by 40 from 4,096",
        "671,026,404,352", "37,552,282,624", "36,625,603,584 without embedding", "11,610,067,968", "653,908,770,816",
        "70,272", "README_WEIGHTS.md", "arXiv 2412.19437", "model=deepseek_v3_tiny data=stdlib",
    ]  # fmt: skip
    assert [word for word in words if word not in " ".join(card.split())] == []


def test_a_card_tells_what_windows_bound(capsys, monkeypatch):
    card = " ".join(said(capsys, monkeypatch, "gemma3_27b").split())
    assert "10 x (5 local, global), 2 local" in card
    # 52 windowed layers of 2 x 16 x 128 numbers for 1,024 positions; the published count of the ten others is 40,960
    assert (
        "507,904 bytes a token" in card and "81,920 in layers that see all, the others keep 416.0 MiB at most" in card
    )


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_model_has_a_card(capsys, monkeypatch, name):
    card = said(capsys, monkeypatch, name, columns=100)
    assert f"model={name}" in card and f"{parameters(compose(name)).total:,}" in card
    assert "data=stdlib" in card, "a size for a CPU belongs to every family"


@pytest.mark.parametrize("name", STAND_INS)
def test_a_stand_in_says_what_is_published_and_what_it_trains(capsys, monkeypatch, name):
    model, trains = STAND_INS[name]
    card = " ".join(said(capsys, monkeypatch, name).split())
    assert card.startswith(f"{model} model={name}")
    assert all(word in card for word in ("unpublished", "Published: ", "Not published: ", f"trains {trains}"))


def test_a_card_without_dimensions_says_so(capsys, monkeypatch):
    card = said(capsys, monkeypatch, "chameleon_34b")
    assert "dimensions are unpublished" in card and "train.py" not in card


@pytest.mark.parametrize(("word", "close"), [("deepseek_v3", "deepseek_v3_671b"), ("lama3_8b", "llama3_8b")])
def test_an_unknown_name_is_one_line_with_close_ones(capsys, word, close):
    assert main([word]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith(f"error: {word}: is not in the zoo") and close in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("word", "first"),
    [
        ("gpt4o", "gpt4o_standin"), ("GPT-4o", "gpt4o_standin"), ("GPT-2.124M", "gpt2_124m"),
        ("Llama-3-8B", "llama3_8b"), ("Claude-3.5-Sonnet", "claude35_standin"), ("deepseek-v3", "deepseek_v3_671b"),
        ("gemini 1.5", "gemini_standin"),
    ],
)  # fmt: skip
def test_other_spellings_of_a_name_suggest_it_first(capsys, word, first):
    assert main([word]) == 2
    assert re.search(r"did you mean (\w+)", capsys.readouterr().err)[1] == first


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["a", "b"], "NAME=a b: must be one architecture; python -m zoo lists them"),
        (["--jsn"], "--jsn: must be one of --tiny, --json, --markdown, --help; did you mean --json?"),
        (["llama3_8b", "--zzzzz=3"], "--zzzzz=3: must be one of --tiny, --json, --markdown, --help"),
        (["--markdown"], "--markdown: expected one argument; python -m zoo --help shows what is allowed"),
        (["--json=a\nb"], "--json: ignored explicit argument 'a\\nb'; python -m zoo --help shows what is allowed"),
        (["a\nb"], "a b: is not in the zoo; python -m zoo lists them"),
    ],
)
def test_a_wrong_command_line_is_one_line(capsys, words, line):
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"error: {line}\n")


def python_m_zoo(*words, **settings):
    return subprocess.run([sys.executable, "-m", "zoo", *words], cwd=ROOT, timeout=60, **settings)


def test_a_console_of_ascii_gets_all_that_it_can_show():
    def shown(encoding, *words):
        surroundings = {**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "90"}
        ended = python_m_zoo(*words, capture_output=True, env=surroundings)
        assert (ended.returncode, ended.stderr) == (0, b"")
        return ended.stdout.decode(encoding)

    assert "…" in shown("utf-8") and shown("ascii") == shown("utf-8").encode("ascii", "replace").decode()
    assert json.loads(shown("ascii", "llama4_maverick", "--json"))["unusual"].count("…") == 2


@pytest.mark.parametrize("words", [[], ["llama3_8b"], ["--json"]])
def test_a_reader_that_goes_away_is_no_error(words):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ended = python_m_zoo(*words, stdout=writer, stderr=subprocess.PIPE)
    finally:
        os.close(writer)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_a_name_like_no_other_is_one_line(capsys):
    assert main(["zzz", "--json"]) == 2
    assert capsys.readouterr().err == "error: zzz: is not in the zoo; python -m zoo lists them\n"


def test_the_page_of_the_zoo_is_up_to_date():
    text = (ROOT / "docs" / "zoo.md").read_text("utf-8")
    above, end, below = text.partition(page.END)
    assert end and above == page.first_part(), "make docs"
    assert "What surveys of these models get wrong" in below


def test_renewing_a_page_keeps_what_was_written_by_hand(tmp_path, capsys):
    path = tmp_path / "zoo.md"
    path.write_text(f"old\n{page.END}\nby hand\n")
    assert main(["--markdown", str(path)]) == 0
    assert path.read_text().startswith("# The zoo\n") and path.read_text().endswith(f"\n{page.END}\nby hand\n")
    path.write_text("nothing of ours\n")
    assert main(["--markdown", str(path)]) == 2
    assert path.read_text() == "nothing of ours\n" and str(path) in capsys.readouterr().err


def test_every_cell_of_the_page_is_in_its_column():
    rows = [line for line in (ROOT / "docs" / "zoo.md").read_text("utf-8").splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {4, 8}


def test_looking_at_the_zoo_loads_no_torch():
    code = "import sys, zoo.__main__ as m; m.main([]); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, timeout=60)


def test_stand_ins_are_named_as_the_surveys_name_their_models():
    assert set(STAND_INS) == set(catalogue.stand_ins())
