"""Whole checkpoints or none: DCP's files in a folder that gets its name, by one rename, when everything is on disk.

``checkpoints/.step-00000100.tmp`` is being written and ``.step-00000100.old`` being deleted; neither counts.
``checkpoints/replaced-1`` holds what a run that started further back has set aside.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer import manifest, stored
from trainer.agree import Ranks
from trainer.config import CheckpointConfig
from trainer.manifest import CheckpointError, Manifest, sync_folder
from trainer.tree import fill, flatten

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(
        self, folder: Path, *, config: CheckpointConfig, rank: int, world_size: int, about: dict[str, Any]
    ) -> None:
        """Remember where checkpoints live; nothing is written.

        Args:
            folder: ``<run_dir>/checkpoints``, on a disk that all ranks share.
            config: how many stay and what a run starts from.
            rank: of this process.
            world_size: number of processes; 1 needs no process group.
            about: what a checkpoint must agree with to be this model's, as JSON: the resolved model config, a
                fingerprint of the tokenizer.
        """
        self.folder = folder
        self.config = config
        self.ranks = Ranks(rank, world_size)
        self.about = json.loads(json.dumps(about))

    def save(
        self,
        step: int,
        state: dict[str, Any],
        *,
        progress: dict[str, Any],
        late: Mapping[str, Tensor] | None = None,
        files: Mapping[str, Path] | None = None,
    ) -> Path:
        """Store the state after ``step`` updates, then delete what ``keep`` no longer wants (collective, all ranks).

        Args:
            step: updates done.
            state: nested dicts and lists of tensors, DTensors and JSON values. A plain tensor or a value has to be
                the same on all ranks that hold it.
            progress: what else the run needs to go on, as JSON; rank 0's is stored.
            late: values of tensors of ``state`` that lie on the meta device, by dotted name; each is asked for when
                its turn comes, so that not all have to be in memory.
            files: to copy beside the tensors, by path in the ``step-…`` folder.

        Returns:
            The ``step-…`` folder.

        Raises:
            CheckpointError: some rank could not write. All ranks raise it, and older checkpoints are untouched.
        """
        target = self.folder / f"step-{step:08d}"
        partial = self.folder / f".{target.name}.tmp"
        tensors, values = _split(flatten(state))
        progress = json.loads(json.dumps(progress))
        doing = f"write checkpoint {target}"
        try:
            files = files or {}
            self.ranks.first(lambda: self._prepare(partial, files), doing=doing)
            alone = self.ranks.world_size == 1
            self.ranks.each(lambda: stored.save(partial, tensors, alone=alone, late=late), doing=doing)
            parts = self.ranks.gather(lambda: (self._fingerprint(partial, files), values), doing=doing)
            facts = Manifest(
                step=step,
                about=self.about,
                progress=progress,
                values={name: value for _, theirs in parts for name, value in theirs.items()},
                files={name: record for files, _ in parts for name, record in files.items()},
            )
            self.ranks.first(lambda: self._publish(facts, partial=partial, target=target), doing=doing)
        except CheckpointError:
            if self.ranks.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        self.ranks.first(self._prune, doing="delete old checkpoints")
        return target

    def restore(self, state: dict[str, Any]) -> dict[str, Any] | None:
        """Start as ``checkpoint.resume`` says: read the state in place, set later checkpoints aside (collective).

        Cut the metrics after this, not before: killed in between, the next start mends both.

        Returns:
            The stored progress; None where the run starts from step 0 and ``state`` is as it was.

        Raises:
            CheckpointError: see ``resolve`` and ``load``.
        """
        path = self.resolve(self.config.resume)
        facts = None if path is None else self._load(path, state)
        step = -1 if facts is None else facts.step
        self.ranks.first(lambda: self._tidy(step), doing=f"tidy {self.folder}")
        return None if facts is None else facts.progress

    def resolve(self, resume: str) -> Path | None:
        """The checkpoint that ``auto``, ``never`` or a folder means; rank 0 decides for all (collective, all ranks).

        Raises:
            CheckpointError: the folder is no whole checkpoint.
        """
        return self.ranks.first(lambda: self._find(resume), doing=f"read checkpoint.resume={resume}")

    def latest(self) -> Path | None:
        """The newest whole checkpoint; one that is not whole is skipped with a warning. Not collective."""
        for path in self._named(past=-1):
            try:
                manifest.read(path)
            except CheckpointError as error:
                log.warning("skipped: %s", error)
            else:
                return path
        return None

    def load(self, path: Path, state: dict[str, Any]) -> dict[str, Any]:
        """Read a checkpoint into the state in place, however many processes saved it (collective, all ranks).

        Leaves that are no tensors are replaced in the dicts and lists of ``state``.

        Returns:
            The stored progress.

        Raises:
            CheckpointError: the checkpoint is damaged, of another model, or holds other tensors. All ranks raise it.
        """
        return self._load(path, state).progress

    def _load(self, path: Path, state: dict[str, Any]) -> Manifest:
        doing = f"read checkpoint {path}"
        leaves = flatten(state)
        facts = self.ranks.each(lambda: self._verified(path), doing=doing)
        contents = self.ranks.each(lambda: stored.read_contents(path), doing=doing)
        saved = {**facts.values, **stored.kinds(contents)}
        unclaimed = self.ranks.gather(lambda: _match(path, saved=saved, leaves=leaves), doing=doing)
        extra = set.intersection(*unclaimed)
        if extra:
            raise CheckpointError(f"checkpoint {path} has {min(extra)}, which is not in this run's state")
        tensors, _ = _split(leaves)
        alone = self.ranks.world_size == 1
        self.ranks.each(lambda: stored.load(path, tensors, contents=contents, alone=alone), doing=doing)
        fill(state, values=facts.values)
        return facts

    def _verified(self, path: Path) -> Manifest:
        """The manifest, once it is this model's and this rank's share of the files has been compared with its sums."""
        facts = manifest.read(path)
        difference = manifest.first_difference(facts.about, self.about)
        if difference is not None:
            raise CheckpointError(f"checkpoint {path} is of another model: {difference}")
        facts.check_sums(path, names=sorted(facts.files)[self.ranks.rank :: self.ranks.world_size])
        return facts

    def _find(self, resume: str) -> Path | None:
        if resume == "never":
            return None
        if resume == "auto":
            return self.latest()
        path = Path(resume)
        if not (path / manifest.NAME).is_file():
            allowed = f"auto, never or a step-… folder with a {manifest.NAME}"
            raise CheckpointError(f"checkpoint.resume={resume}: must be {allowed}")
        manifest.read(path)
        return path

    def _named(self, *, past: int) -> list[Path]:
        """Folders named as checkpoints of steps past this one, newest first, whole or not."""
        if not self.folder.is_dir():
            return []
        steps = {path: re.fullmatch(r"step-(\d{8,})", path.name) for path in self.folder.iterdir()}
        found = {path: int(match[1]) for path, match in steps.items() if match is not None}
        return sorted((path for path in found if found[path] > past), key=lambda path: -found[path])

    def _prepare(self, partial: Path, files: Mapping[str, Path]) -> None:
        """Make the folder to write to, and copy files into it, down to the disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        partial.mkdir()
        for name, source in files.items():
            (partial / name).parent.mkdir(exist_ok=True)
            with source.open("rb") as read, (partial / name).open("xb") as write:
                shutil.copyfileobj(read, write)
                write.flush()
                os.fsync(write.fileno())
            sync_folder((partial / name).parent)

    def _tidy(self, step: int) -> None:
        """Do what a killed run left undone, and set aside what is past the step that a run starts from."""
        if self.folder.is_dir():
            self._set_aside(self._named(past=step))
            self._prune()
            self._sweep()

    def _sweep(self) -> None:
        """Delete what killed runs left half written or half deleted."""
        for path in self.folder.iterdir():
            if re.fullmatch(r"\.step-\d{8,}\.(tmp|old)", path.name):
                _delete(path)

    def _fingerprint(self, partial: Path, files: Mapping[str, Path]) -> dict[str, manifest.FileRecord]:
        """Records of the files that this rank wrote: DCP calls them ``__<rank>_<n>.distcp``."""
        names = [path.name for path in partial.glob(f"__{self.ranks.rank}_*")]
        return manifest.fingerprint(partial, names=names + [stored.CONTENTS, *files] * (self.ranks.rank == 0))

    def _publish(self, facts: Manifest, *, partial: Path, target: Path) -> None:
        """Write the manifest and give the folder its name."""
        facts.check_sizes(partial)  # on a disk that is not shared, another node's files are missing here
        facts.write(partial)
        sync_folder(partial)
        if target.exists():
            self._set_aside([target])
        os.rename(partial, target)
        sync_folder(self.folder)

    def _set_aside(self, paths: list[Path]) -> None:
        """Move checkpoints, the newest first, to where they no longer count."""
        if not paths:
            return
        number = 1
        while (self.folder / f"replaced-{number}").exists():
            number += 1
        aside = self.folder / f"replaced-{number}"
        aside.mkdir()
        for path in paths:
            os.rename(path, aside / path.name)
            sync_folder(self.folder)
        log.warning("set aside %d checkpoints from %s on: %s", len(paths), paths[-1].name, aside)

    def _prune(self) -> None:
        """Delete all but the newest ``keep`` checkpoints; each loses its name at once, then its files."""
        whole = 0
        for path in self._named(past=-1) if self.config.keep else []:
            whole += (path / manifest.NAME).is_file()
            if whole > self.config.keep:
                old = path.with_name(f".{path.name}.old")
                os.rename(path, old)
                sync_folder(self.folder)
                _delete(old)


def _delete(folder: Path) -> None:
    """Delete a folder; one that will not go, such as one read over NFS, is no reason to stop a run."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        log.warning("cannot delete %s: %s", folder, error)


def _split(leaves: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and other values of a flat state."""
    tensors = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor)}
    return tensors, {name: leaf for name, leaf in leaves.items() if name not in tensors}


def _match(path: Path, *, saved: dict[str, Any], leaves: dict[str, Any]) -> set[str]:
    """Compare names, shapes and dtypes of a checkpoint with those of a flat state.

    Args:
        path: of the checkpoint, for messages.
        saved: its values and its tensors' kinds, by name.
        leaves: the state.

    Returns:
        Names that only the checkpoint has.

    Raises:
        CheckpointError: a name is missing in the checkpoint, or its tensor has another shape or dtype.
    """
    for name, leaf in leaves.items():
        if name not in saved:
            raise CheckpointError(f"checkpoint {path} has no {name}, which is in this run's state")
        wanted = stored.Kind(tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else None
        found = saved[name] if isinstance(saved[name], stored.Kind) else None
        if found != wanted:
            raise CheckpointError(
                f"checkpoint {path} holds {name} as {found or 'a value'}, this run as {wanted or 'a value'}"
            )
    return saved.keys() - leaves.keys()
