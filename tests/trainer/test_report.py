"""What is told of a finished run, from its files."""

import json

import pytest

from trainer.report import gather, main


def make_run(folder):
    rows = []
    for step in range(1, 41):
        load = 3.0 if step <= 10 else 2.0 if step <= 30 else 1.25
        row = {"step": step, "loss": 9.0 - step / 10, "tokens_per_second": 1000.0 * step, "expert_load_max": load}
        rows.append(row | ({"val_loss": 4.0 + 1 / step} if step % 20 == 0 else {}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = folder / "corpus"
    corpus.mkdir()
    (corpus / "manifest.json").write_text(json.dumps({"unigram_entropy": 5.5}))
    (folder / "run.yaml").write_text(f"data:\n  folder: {corpus}\n")
    for name in (
        "checkpoints/step-00000020",
        "checkpoints/step-00000040",
        "checkpoints/.step-00000060.tmp",
        "hf",
        "plots",
    ):
        (folder / name).mkdir(parents=True)
    (folder / "hf" / "config.json").write_text("{}")
    (folder / "plots" / "loss.png").write_bytes(b"")
    (folder / "samples").mkdir()
    (folder / "samples" / "step-00000020.txt").write_text("early")
    (folder / "samples" / "step-00000040.txt").write_text("def f(x):\n    return [x]\n")


def test_a_finished_run_is_told_whole(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    make_run(tmp_path)
    assert main([str(tmp_path), "--exported", str(tmp_path / "hf")]) == 0
    shown = capsys.readouterr().out
    for part in (
        "8.900 to 5.000 in 40 updates",
        "4.025 nats a token, 1.475 below the corpus's unigram entropy of 5.500",
        "20,500 tokens/s",
        "3.00x the mean in the first 10 updates, 1.25x in the last 10",
        str(tmp_path / "plots" / "loss.png"),
        str(tmp_path / "checkpoints" / "step-00000040"),
        str(tmp_path / "hf"),
        "return [x]",
    ):
        assert part in shown


def test_what_is_missing_is_said_in_a_word(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "tokens_per_second": 10.0}\n')
    assert main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for part in ("no evaluation was made", "no experts", "none was drawn", "none was sampled", "none was exported"):
        assert part in shown


def test_a_loss_above_the_entropy_is_not_called_below(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    make_run(tmp_path)
    (tmp_path / "corpus" / "manifest.json").write_text(json.dumps({"unigram_entropy": 4.0}))
    main([str(tmp_path)])
    assert "0.025 above the corpus's unigram entropy" in capsys.readouterr().out


def test_a_moved_corpus_leaves_the_entropy_out(tmp_path):
    make_run(tmp_path)
    (tmp_path / "corpus" / "manifest.json").unlink()
    assert gather(tmp_path).entropy is None


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("metrics.jsonl", "", "must be the folder of a run"),
        ("metrics.jsonl", "{]\n", "line 1: must be a JSON object"),
        ("run.yaml", "data: [", "is damaged"),
        ("corpus/manifest.json", "{}", "must be a JSON object with a unigram_entropy"),
    ],
)
def test_a_damaged_folder_is_one_line_and_status_2(tmp_path, capsys, file, content, said):
    make_run(tmp_path)
    (tmp_path / file).write_text(content)
    assert main([str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert len(captured.err.splitlines()) == 1
    assert captured.out == ""


def test_folders_that_are_none_are_named(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "nowhere: must be the folder of a run" in capsys.readouterr().err
    make_run(tmp_path)
    assert main([str(tmp_path), "--exported", str(tmp_path / "samples")]) == 2
    assert "must be a Hugging Face folder" in capsys.readouterr().err
