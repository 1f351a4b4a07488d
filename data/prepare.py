"""Makes a folder of token shards of any text: ``python -m data.prepare source=… out=…``, and the embedded corpus."""

import difflib
import math
import os
import sys
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.config import DataConfig, Kind, PrepareConfig, TokenizerConfig
from data.encode import encode
from data.errors import DataError
from data.files import locked, writing
from data.install import entry, install
from data.manifest import DTYPES, FORMAT, NAME, Manifest, Settings, file_sha256, read_manifest, total
from data.progress import ProgressLine
from data.resume import PROGRESS, Progress, begin, check_files, check_same, clean, clear, read_progress
from data.stdlib import StdlibSource
from data.text import FileSource, Source
from data.tokenizer import Tokenizer
from data.write import CorpusWriter

USAGE = """\
usage: python -m data.prepare source=SOURCE out=FOLDER [key=value ...]

  source=      a file, a folder, a pattern such as 'books/*.txt', hf:NAME (any dataset), or stdlib;
               .jsonl and .parquet are read by record, other files whole, each also with .gz (not .parquet)
  out=         folder to make; the same command again continues it after an interruption
  vocab_size=  of a SentencePiece to train on the text, or give a tokenizer:
  tokenizer.kind=sentencepiece|tokenizers|tiktoken   tokenizer.file=PATH   tokenizer.name=ENCODING   tokenizer.eos=TOKEN
  text_key=text   pattern='*'   validation=0.005   shard_tokens=67108864   threads=0
  hub.config=  hub.split=train  hub.streaming=false  hub.data_files=  hub.data_dir=  hub.revision=

example: python -m data.prepare source=books.jsonl.gz out=shards/books vocab_size=32000
then:    python train.py data=shards data.folder=shards/books"""


def prepare(config: PrepareConfig, *, renew: bool = False, wait: bool = False) -> Manifest:
    """Make the shards that ``config`` asks for, or continue making them; nothing if they are whole.

    Args:
        config: the request.
        renew: replace a preparation of the same kind whose source has changed or whose files are gone.
        wait: until another process has finished with the folder.

    Raises:
        DataError: One line for whatever a user can mend.
    """
    source = _open_source(config)
    settings = _settings(config, source=source)
    folder = Path(config.out or "")
    if not any(document.text for document in source.documents(0)):
        raise DataError(f"source={config.source}: holds no text")
    with locked(folder, wait=wait):
        if renew:
            _clear_outdated(folder, settings=settings)
        if (folder / NAME).exists():
            manifest = read_manifest(folder)
            check_same(manifest.settings, asked=settings, folder=folder)
            check_files(folder, splits=manifest.splits, dtype=manifest.dtype)
            _end(folder)
            return manifest
        progress = read_progress(folder) or begin(folder, settings=settings)
        check_same(progress.settings, asked=settings, folder=folder)
        clean(folder)
        return _write(config, source=source, folder=folder, progress=progress)


def ensure(config: DataConfig) -> None:
    """See to it that the data of a run can be read: make the embedded corpus's shards if they are not whole.

    Shards of another Python's standard library are replaced. Shows progress on stderr.

    Raises:
        DataError: A folder of shards is not whole, or the embedded corpus was prepared there with other settings.
    """
    if config.kind is Kind.synthetic:
        return
    if config.kind is Kind.shards:
        manifest = read_manifest(config.folder or "")
        check_files(Path(config.folder or ""), splits=manifest.splits, dtype=manifest.dtype)
        return
    prepare(
        PrepareConfig(
            source="stdlib",
            out=config.folder,
            tokenizer=config.tokenizer,
            vocab_size=config.vocab_size,
            validation=config.validation,
        ),
        renew=True,
        wait=True,
    )


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy in nats of tokens drawn at random from a corpus; summed exactly, so the same everywhere.

    Args:
        counts: (vocab_size,) how often each token occurs.
    """
    n_tokens = int(counts.sum())
    return math.fsum(-count / n_tokens * math.log(count / n_tokens) for count in counts.tolist() if count)


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    try:
        config = parse(arguments)
        manifest = prepare(config)
    except ValueError as error:
        print(f"data.prepare: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("data.prepare: interrupted; the same command continues", file=sys.stderr)
        return 130
    train, validation = manifest.splits["train"], manifest.splits["validation"]
    print(
        f"{config.out}: {train.tokens:,} training tokens in {train.documents:,} documents, {validation.tokens:,} "
        f"validation tokens in {validation.documents:,}, unigram entropy {manifest.unigram_entropy:.4f} nats"
    )
    return 0


def parse(arguments: list[str]) -> PrepareConfig:
    """Turn ``key=value`` arguments into a config.

    Raises:
        DataError: A key is unknown or a value is of the wrong type.
        ValueError: A value is not allowed.
    """
    schema = OmegaConf.structured(PrepareConfig)
    keys = [*(key for key in schema if not OmegaConf.is_config(schema[key]))]
    keys += [f"{group}.{key}" for group in ("hub", "tokenizer") for key in schema[group]]
    for argument in arguments:
        key, separator, _ = argument.partition("=")
        if not separator:
            raise DataError(f"{argument}: must be key=value; --help lists the keys")
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1)
            meant = f"did you mean {near[0]}?" if near else f"must be one of {', '.join(keys)}"
            raise DataError(f"{key}: is not a key: {meant}")
    try:
        config = OmegaConf.to_object(OmegaConf.merge(schema, OmegaConf.from_dotlist(arguments)))
    except OmegaConfBaseException as error:
        raise DataError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    assert isinstance(config, PrepareConfig), f"{config=}"
    return config


def _open_source(config: PrepareConfig) -> Source:
    source = config.source or ""
    if source == "stdlib":
        return StdlibSource()
    if source.startswith("hf:"):
        from data.hub import HubSource  # takes seconds to import

        return HubSource(source.removeprefix("hf:"), config=config.hub, text_key=config.text_key)
    if Path(source).is_dir() and Path(config.out or "").resolve().is_relative_to(Path(source).resolve()):
        raise DataError(f"out={config.out}: must lie outside source={source}, which would read it")
    return FileSource(source, pattern=config.pattern, text_key=config.text_key)


def _settings(config: PrepareConfig, *, source: Source) -> Settings:
    """All that decides the bytes of the shards."""
    return {
        **source.settings,
        "tokenizer.kind": config.tokenizer.kind.value,
        "tokenizer.name": config.tokenizer.name,
        "tokenizer.file": _tokenizer_identity(config.tokenizer),
        "tokenizer.eos": config.tokenizer.eos,
        "vocab_size": config.vocab_size,
        "validation": config.validation,
        "shard_tokens": config.shard_tokens,
    }


def _tokenizer_identity(config: TokenizerConfig) -> str | None:
    return None if config.file is None else f"file with sha256 {file_sha256(Path(config.file))}"


def _clear_outdated(folder: Path, *, settings: Settings) -> None:
    """Remove the embedded corpus of another Python, or one that lost files; other settings are the user's to solve."""
    unfinished = None if (folder / NAME).exists() else read_progress(folder)
    if unfinished is None and not (folder / NAME).exists():
        return
    found = unfinished.settings if unfinished is not None else read_manifest(folder).settings
    if found.get("source") != "stdlib":
        return
    check_same({**found, "corpus_sha256": settings["corpus_sha256"]}, asked=settings, folder=folder)
    if found["corpus_sha256"] != settings["corpus_sha256"]:
        reason = "it is of another Python's standard library"
    elif unfinished is None:
        try:
            manifest = read_manifest(folder)
            check_files(folder, splits=manifest.splits, dtype=manifest.dtype)
            return
        except DataError as error:
            reason = str(error)
    else:
        return
    print(f"{folder}: is prepared anew: {reason}", file=sys.stderr)
    clear(folder)


def _write(config: PrepareConfig, *, source: Source, folder: Path, progress: Progress) -> Manifest:
    """Tokenise what is left of the source; the manifest comes last."""
    with ProgressLine(str(folder)) as line:
        line.say("opening or training the tokenizer")
        texts = (document.text for document in source.documents(0))
        tokenizer = install(config.tokenizer, folder=folder, vocab_size=config.vocab_size, texts=texts)
        dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
        check_files(folder, splits=progress.shards, dtype=dtype)
        if progress.n_documents == 0:
            progress.counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        else:
            line.say(f"continuing after {progress.n_documents:,} documents")
        writer = CorpusWriter(
            folder,
            progress=progress,
            dtype=DTYPES[dtype],
            shard_tokens=config.shard_tokens,
            held_out=config.validation,
        )
        try:
            _tokenize(config, source=source, tokenizer=tokenizer, writer=writer, progress=progress, line=line)
        except DataError:
            writer.abandon()
            raise
    splits = {split: total(shards) for split, shards in progress.shards.items()}
    if splits["train"].tokens == 0:
        raise DataError(f"validation={config.validation}: must be lower: it took every document of {config.source}")
    manifest = Manifest(
        format=FORMAT,
        source=source.description,
        settings=progress.settings,
        tokenizer=entry(tokenizer, config=config.tokenizer),
        dtype=dtype,
        unigram_entropy=unigram_entropy(progress.counts),
        splits=splits,
    )
    manifest.write(folder)
    _end(folder)
    return manifest


def _end(folder: Path) -> None:
    """Remove what only an unfinished folder needs."""
    with writing(folder / PROGRESS):
        (folder / PROGRESS).unlink(missing_ok=True)


def _tokenize(
    config: PrepareConfig,
    *,
    source: Source,
    tokenizer: Tokenizer,
    writer: CorpusWriter,
    progress: Progress,
    line: ProgressLine,
) -> None:
    """Tokenise and write the documents that ``progress`` has not; empty ones are counted and left out."""
    line.restart()
    threads = config.threads or len(os.sched_getaffinity(0))
    n_documents = progress.n_documents
    for document in encode(source.documents(progress.n_documents), tokenizer=tokenizer, threads=threads):
        n_documents = document.number + 1
        if document.content:
            writer.add(document.tokens, content=document.content, number=document.number)
            line.add(tokens=len(document.tokens))
    writer.end_segment(n_documents=n_documents)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
