"""Train a model: compose the run, build its parts, fit. Usage: python train.py model=llama3_tiny train.steps=100."""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from conf import schema
from data.corpus import declared_vocabulary
from data.errors import DataError
from data.prepare import ensure
from data.streams import open_streams
from launch.command import leave, outcome, refusing
from launch.world import World, hear_hydra, world
from parallel.apply import build, describe
from parallel.config_fit import Sizes
from parallel.mesh import MeshError, open_mesh
from planner.front import plan
from trainer.agree import Ranks, lost
from trainer.checkpoint import Checkpoints
from trainer.engine import TorchEngine
from trainer.guard import Diverged
from trainer.identity import identity
from trainer.log import Log
from trainer.loop import Outputs, Recipe, Trainer
from trainer.manifest import CheckpointError
from trainer.metrics import Metrics, MetricsError
from trainer.record import record
from trainer.sample import Sampler
from trainer.start import start
from trainer.watch import Watch
from zoo.hf import HFError

ERRORS = (*schema.USER_ERRORS, DataError, MeshError, CheckpointError, HFError, MetricsError, Diverged, OSError)


@hydra.main(version_base=None, config_path="conf", config_name="train")
def main(cfg: DictConfig) -> None:
    """Check a run, then do it, or what is left of it."""
    place = world()
    with refusing(ERRORS, rank=place.rank, lost=lost):
        run = schema.resolve(cfg)
        sizes = schema.check(run, world_size=run.world_size or place.size)
        schema.check_vocabulary(run, tokens=declared_vocabulary(run.data))
        if run.dry_run:
            return plan(run, world_size=sizes.ranks, choice=schema.chosen("model"))
        with outcome(Path(run.run_dir), errors=ERRORS, rank=place.rank):
            train(run, sizes=sizes, place=place)


def train(run: schema.RunConfig, *, sizes: Sizes, place: World) -> None:
    """Build the parts of a run and fit (all axes)."""
    t, folder = run.train, Path(run.run_dir)
    mesh = open_mesh(sizes, rank=place.rank, local_rank=place.local_rank)
    Ranks(place.rank, place.size, DataError).first(lambda: ensure(run.data), doing="read or prepare the data")
    streams = open_streams(run.data, rank=mesh.dp_rank, world_size=sizes.dp, **schema.rows(run))
    schema.check_vocabulary(run, tokens=streams.corpus.vocab_size)
    model = build(run.model, mesh=mesh, precision=run.precision, plan=run.parallel, seq_len=t.seq_len)
    engine = TorchEngine(model, mesh=mesh, train=t, optim_config=run.optim)
    about = identity(run.model, tokenizer=streams.corpus.fingerprint)
    ranks = {"rank": place.rank, "world_size": place.size}
    checkpoints = Checkpoints(folder / "checkpoints", config=run.checkpoint, about=about, **ranks)
    state = start(engine, checkpoints=checkpoints, stream=streams.train, seed=run.seed)
    record(folder, settings=(settings := schema.plain(run)), tokenizer=streams.corpus.files, rank=mesh.rank)
    metrics = Metrics(folder, rank=mesh.rank, step=state.step)
    sampler = Sampler.of(streams.corpus.tokenizer, train=t, folder=folder / "samples", mesh=mesh)
    entropy = streams.corpus.unigram_entropy
    with Log(run.log, run_dir=folder, rank=mesh.rank, steps=t.steps, settings=settings, entropy=entropy) as log:
        log.say(describe(model, mesh=mesh, precision=run.precision, plan=run.parallel, choice=schema.chosen("model")))
        watch = Watch(run.log, train=t, schedule=run.schedule, engine=engine, state=state, folder=folder)
        outputs = Outputs(metrics, log, checkpoints, sampler, watch)
        recipe = Recipe(t, run.optim, run.schedule, dp=sizes.dp)
        Trainer(engine, mesh=mesh, state=state, streams=streams, recipe=recipe, outputs=outputs).fit()
    mesh.close()


if __name__ == "__main__":
    hear_hydra()
    schema.register()
    with refusing(ERRORS, rank=world().rank, lost=lost), schema.composing(sys.argv[1:]):
        main()
    leave(processes=world().size)
