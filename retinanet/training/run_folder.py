"""The files of a training run, and the check that a continued run has the same model, options and data.

A run folder holds `config.json` (model, options, data and where it is), `metrics.jsonl` (losses and COCO numbers),
`last.pt` (the whole state between two steps), `last.safetensors` and `best.safetensors` (models).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch.utils.data import Dataset

from retinanet.checkpoints.model_file import load_state, save_model, save_state
from retinanet.common.errors import ConfigError, DataError, UsageError
from retinanet.common.files import output_folder, read_json, replacing, reserve, write_json
from retinanet.data import DetectionDataset
from retinanet.model.config import RetinaNetConfig
from retinanet.model.detector_config import DetectorConfig, config_from_dict
from retinanet.training.learner import Learner
from retinanet.training.options import CHANGEABLE_ON_RESUME, TrainOptions
from retinanet.training.progress import Progress

#: Names of the file with the whole state of a run, of the models, and of the file with losses and COCO numbers.
STATE_NAME, LAST_NAME, BEST_NAME, METRICS_NAME = "last.pt", "last.safetensors", "best.safetensors", "metrics.jsonl"


def describe_run(
    config: DetectorConfig, options: TrainOptions, train_set: Dataset[Any], val_set: DetectionDataset | None
) -> dict[str, Any]:
    """Return the content of `config.json`: everything that decides the result of a run, as JSON values."""
    sets: dict[str, Dataset[Any]] = {"train": train_set}
    if val_set is not None:
        sets["validation"] = val_set
    content = {
        "architecture": config.architecture,
        "model": config.to_dict(),
        "options": options.to_dict(),
        "data": {name: _describe_set(dataset) for name, dataset in sets.items()},
    }
    return dict(json.loads(json.dumps(content)))


def check_presence(path: Path, resume: bool) -> None:
    """Check that a folder holds a run that can be resumed, or none that would be overwritten.

    Raises:
        UsageError: The folder holds a run and `resume` is False, or the reverse.
    """
    exists = (path / STATE_NAME).exists()
    if resume and not exists:
        raise UsageError(f"{path}: no run to resume: the folder has no {STATE_NAME}")
    if exists and not resume:
        raise UsageError(f"{path}: holds a run already; continue it with --resume, or name another folder")


class RunFolder:
    """The folder of one run; as a context manager, it keeps other processes out of the folder.

    Args:
        path: The folder; made on entry if it does not exist.
        description: What `describe_run` returns for this run.
        resume: True if the folder must hold a run to continue. False if it must not hold a run.
        data_options: JSON values that say where the data is, for `config.json`. None keeps those of the continued run.

    Raises (on entry):
        UsageError: The folder holds a run and `resume` is False, or the reverse, or another process uses it, or it
            cannot be written.
    """

    def __init__(
        self, path: Path, description: dict[str, Any], *, resume: bool, data_options: Mapping[str, Any] | None = None
    ) -> None:
        """Keep the arguments."""
        self.path = path
        self.description = description
        self.resume = resume
        self.data_options = data_options
        self.state_path = path / STATE_NAME
        self.metrics_path = path / METRICS_NAME
        self.config_path = path / "config.json"
        self._saved: dict[str, Any] = {}
        self._kept: str | None = None
        # The operating system frees the lock of a process that ends, however it ends.
        self._lock = FileLock(path / ".lock", timeout=0)

    def __enter__(self) -> RunFolder:
        """Make and lock the folder, and remove the temporary files of a run that was killed."""
        check_presence(self.path, self.resume)
        output_folder(self.path)
        self._acquire()
        try:
            check_presence(self.path, self.resume)
            for leftover in self.path.glob(".*.tmp"):
                leftover.unlink()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def _acquire(self) -> None:
        try:
            self._lock.acquire()
        except Timeout as error:
            raise UsageError(
                f"{self.path}: another process is training in this folder; wait for its end, or name another folder"
            ) from error
        except OSError as error:
            raise UsageError(f"{self.path}: the run folder cannot be locked ({error.strerror})") from error

    def start(self) -> None:
        """Write `config.json`, unless it has this content already."""
        before = read_json(self.config_path) if self.config_path.is_file() else {}
        data_options = before.get("data_options") if self.data_options is None else dict(self.data_options)
        content = self.description | ({} if data_options is None else {"data_options": data_options})
        if content != before:
            write_json(self.config_path, content)

    def save(self, learner: Learner, progress: Progress) -> None:
        """Write the model and then the state, which alone decides where a continued run starts."""
        save_model(self.path / LAST_NAME, learner.result)
        state = {"description": json.dumps(self.description), "progress": asdict(progress), **learner.state()}
        save_state(self.state_path, state)
        self._kept = progress.place

    def save_best(self, learner: Learner) -> None:
        """Write the best model."""
        save_model(self.path / BEST_NAME, learner.result)

    def check_room(self, learner: Learner) -> None:
        """Check that there is room for the files of the run, which grow until the first steps are complete.

        Raises:
            UsageError: There is not.
        """
        state, model = learner.state_bytes()
        last, best = self.path / LAST_NAME, self.path / BEST_NAME
        before = self.state_path.stat().st_size if self.state_path.exists() else 0
        # A new state is written beside the last one, which has grown to the same size by then.
        sizes = [state, state - before, *(model for path in (last, best) if not path.exists())]
        try:
            reserve(self.path, sizes)
        except OSError as error:
            free = shutil.disk_usage(self.path).free
            raise UsageError(
                f"{self.path}: no room for the files of this run: saving them takes {_megabytes(sum(sizes))} more, "
                f"{_megabytes(free)} are free ({error.strerror}); make room, or choose another folder"
            ) from error

    @contextmanager
    def explaining_write_errors(self) -> Iterator[None]:
        """Turn the error of a file that cannot be written into one that says what is kept and how to continue.

        Raises:
            UsageError: A file of the run cannot be written.
        """
        try:
            yield
        except OSError as error:
            if error.filename is None or Path(error.filename).parent != self.path:
                raise
            kept = "nothing was saved"
            if self._kept is not None:
                kept = (
                    f"{self.state_path.name} still holds the state {self._kept}; when the folder can be written again, "
                    f"continue with `retinanet train --resume {self.path}`"
                )
            raise UsageError(f"{error.filename}: cannot be written ({error.strerror}); {kept}") from error

    def saved_progress(self) -> Progress:
        """Read `last.pt`, which `restore` will need as well, and return the progress of the run.

        Raises:
            UsageError: The run in the folder had another model, other options or other data.
            DataError: `last.pt` is damaged, or is not the state of a training run.
        """
        self._saved = load_state(self.state_path)
        try:
            description = json.loads(self._saved["description"])
            # Runs of earlier versions name no architecture, have the fields of `compat` beside the others, and lack
            # newer options.
            description = {"architecture": RetinaNetConfig.architecture, **description}
            config = config_from_dict(description["model"], description["architecture"])
            description["model"] = json.loads(json.dumps(config.to_dict()))
            defaults = json.loads(json.dumps(TrainOptions().to_dict()))
            options = defaults | description["options"]
            options["transform"] = defaults["transform"] | options["transform"]
            description["options"] = options
            progress, _ = Progress(**self._saved["progress"]), self._saved["model"]
        except (ConfigError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{self.state_path}: not the state of a training run") from error
        progress.planned_epochs = progress.planned_epochs or options["epochs"]
        self._check_same(description, progress)
        return progress

    def restore(self, learner: Learner) -> None:
        """Restore a learner to the state that `save` wrote, and rewrite the other files to match that state."""
        learner.load_state(self._saved)
        progress = Progress(**self._saved["progress"])
        self._saved = {}
        self._kept = progress.place
        self.start()
        with replacing(self.metrics_path) as temporary:
            temporary.write_text("".join(line + "\n" for line in progress.lines), encoding="utf-8")

    def _check_same(self, saved: dict[str, Any], progress: Progress) -> None:
        before, now = _flat(saved), _flat(self.description)
        changeable = {f"options.{name}" for name in CHANGEABLE_ON_RESUME}
        for key in {**now, **before}:
            if key in changeable or before.get(key) == now.get(key):
                continue
            if key == "options.epochs":
                self._check_epochs(before[key], now[key], now["options.schedule"], progress)
            else:
                raise UsageError(
                    f"{self.path}: cannot resume: {key} was {before.get(key)!r} in this run, now it is {now.get(key)!r}"
                )

    def _check_epochs(self, before: int, now: int, schedule: str, progress: Progress) -> None:
        if schedule != "constant":
            raise UsageError(
                f"{self.path}: cannot resume with {now} epochs: the {schedule} schedule has planned the learning rates "
                f"of this run for {before}; to train longer, start a new run with --weights "
                f"{self.path / 'last.safetensors'}"
            )
        begun = progress.epoch + (progress.step > 0)
        if now < begun:
            raise UsageError(f"{self.path}: cannot resume with {now} epochs: it has begun epoch {begun}")


def _describe_set(dataset: Dataset[Any]) -> dict[str, Any]:
    if not isinstance(dataset, DetectionDataset):
        length = len(dataset) if hasattr(dataset, "__len__") else None
        return {"type": type(dataset).__qualname__, "images": length}
    digest = hashlib.sha256(json.dumps([dataset.image_ids, dataset.coco["annotations"]]).encode()).hexdigest()
    return {
        "images": len(dataset),
        "class_names": list(dataset.class_names),
        "category_ids": list(dataset.category_ids),
        "sha256": digest,
    }


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _megabytes(size: int) -> str:
    return f"{max(1, round(size / 1e6)):,} MB"
