"""The files of a training run, and the check that a continued run has the same model, options and data.

A run folder holds `config.json` (model, options, data), `metrics.jsonl` (losses and COCO numbers), `last.pt` (the whole
state between two steps), `last.safetensors` and `best.safetensors` (models).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from retinanet.checkpoints.model_file import load_state, save_model, save_state
from retinanet.common.errors import DataError, UsageError
from retinanet.common.files import output_folder, replacing, write_json
from retinanet.data import DetectionDataset
from retinanet.model.config import ConfigError, RetinaNetConfig
from retinanet.training.learner import Learner
from retinanet.training.options import CHANGEABLE_ON_RESUME, TrainOptions
from retinanet.training.progress import Progress


def describe_run(
    config: RetinaNetConfig, options: TrainOptions, train_set: DetectionDataset, val_set: DetectionDataset | None
) -> dict[str, Any]:
    """Return the content of `config.json`: everything that decides the result of a run, as JSON values."""
    sets = {"train": train_set} | ({} if val_set is None else {"validation": val_set})
    content = {
        "model": config.to_dict(),
        "options": options.to_dict(),
        "data": {name: _describe_set(dataset) for name, dataset in sets.items()},
    }
    return dict(json.loads(json.dumps(content)))


class RunFolder:
    """The folder of one run.

    Args:
        path: The folder; made if it does not exist.
        description: What `describe_run` returns for this run.
        resume: True if the folder must hold a run to continue. False if it must not hold a run.

    Raises:
        UsageError: The folder holds a run and `resume` is False, or the reverse, or it cannot be written.
    """

    def __init__(self, path: Path, description: dict[str, Any], *, resume: bool) -> None:
        """Make the folder, and remove the temporary files of a run that was killed."""
        self.path = output_folder(path)
        self.description = description
        self.state_path = path / "last.pt"
        self.metrics_path = path / "metrics.jsonl"
        exists = self.state_path.exists()
        if resume and not exists:
            raise UsageError(f"{path}: no run to resume: the folder has no {self.state_path.name}")
        if exists and not resume:
            raise UsageError(f"{path}: holds a run already; resume it or name another folder")
        for leftover in path.glob(".*.tmp"):
            leftover.unlink()

    def start(self) -> None:
        """Write `config.json`."""
        write_json(self.path / "config.json", self.description)

    def save(self, learner: Learner, progress: Progress) -> None:
        """Write the model and then the state, which alone decides where a continued run starts."""
        save_model(self.path / "last.safetensors", learner.result)
        state = {"description": json.dumps(self.description), "progress": asdict(progress), **learner.state()}
        save_state(self.state_path, state)

    def save_best(self, learner: Learner) -> None:
        """Write the best model."""
        save_model(self.path / "best.safetensors", learner.result)

    def restore(self, learner: Learner) -> Progress:
        """Restore a learner to the state that `save` wrote, and rewrite `metrics.jsonl` to match that state.

        Returns:
            The progress of the run.

        Raises:
            UsageError: The run in the folder had another model, other options or other data.
            DataError: `last.pt` is damaged, or is not the state of a training run.
        """
        saved = load_state(self.state_path)
        try:
            description = json.loads(saved["description"])
            # Runs of earlier versions have the fields of `compat` beside the others.
            description["model"] = json.loads(json.dumps(RetinaNetConfig.from_dict(description["model"]).to_dict()))
            progress, _ = Progress(**saved["progress"]), saved["model"]
        except (ConfigError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{self.state_path}: not the state of a training run") from error
        self._check_same(description)
        learner.load_state(saved)
        with replacing(self.metrics_path) as temporary:
            temporary.write_text("".join(line + "\n" for line in progress.lines), encoding="utf-8")
        return progress

    def _check_same(self, saved: dict[str, Any]) -> None:
        before, now = _flat(saved), _flat(self.description)
        changeable = {f"options.{name}" for name in CHANGEABLE_ON_RESUME}
        for key in {**now, **before}:
            if key not in changeable and before.get(key) != now.get(key):
                raise UsageError(
                    f"{self.path}: cannot resume: {key} was {before.get(key)!r} in this run, now it is {now.get(key)!r}"
                )


def _describe_set(dataset: DetectionDataset) -> dict[str, Any]:
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
