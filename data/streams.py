"""All that one rank of a run reads: the facts of the corpus, the rows to train on and those to evaluate on."""

from collections.abc import Sequence
from dataclasses import dataclass

from data.batch import Batch
from data.config import DataConfig
from data.corpus import Corpus, open_corpus
from data.loader import Loader
from data.share import share


@dataclass(frozen=True)
class Streams:
    """Opened data.

    Attributes:
        corpus: vocabulary, tokenizer, entropy.
        train: micro-batches without end.
        validation: this rank's micro-batches of one evaluation, the same each time.
    """

    corpus: Corpus
    train: Loader
    validation: list[Batch]


def open_streams(
    config: DataConfig,
    *,
    seed: int,
    rank: int,
    world_size: int,
    global_batch: int,
    micro_batch: int,
    eval_rows: int,
    seq_len: int,
    n_mtp: int,
    ramp: Sequence[tuple[int, int]] = (),
) -> Streams:
    """Open prepared data.

    Args:
        config: what to read.
        seed: of the order of rows.
        rank: of this process among those that read different rows.
        world_size: how many of those there are.
        global_batch: rows of one update, all ranks together.
        micro_batch: rows of one forward.
        eval_rows: rows of one evaluation, all ranks together; 0: none.
        seq_len: tokens of a row.
        n_mtp: depths of multi-token prediction.
        ramp: (batches, rows of each) of the first batches, where they have other sizes than ``global_batch``.

    Raises:
        DataError: the data is missing, not whole, damaged or too small.
    """
    corpus = open_corpus(config)
    train = Loader(
        config,
        seed=seed,
        rank=rank,
        world_size=world_size,
        global_batch=global_batch,
        micro_batch=micro_batch,
        seq_len=seq_len,
        n_mtp=n_mtp,
        ramp=ramp,
    )
    if not eval_rows:
        return Streams(corpus, train, [])
    held_out = Loader(
        config,
        seed=seed,
        rank=0,
        world_size=1,
        global_batch=eval_rows,
        micro_batch=1,
        seq_len=seq_len,
        n_mtp=n_mtp,
        split="validation",
    )
    part = share(held_out.rows(0), rank=rank, world_size=world_size, micro_batch=micro_batch)
    return Streams(corpus, train, part)
