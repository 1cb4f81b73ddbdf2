"""Files that are cut off or get a bit turned over while their run is down, and how they are put right again."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from alignment.run_folder import RunFolder
from faults.plan import Fault
from models.checkpoints import finished


@dataclass(frozen=True)
class Damaged:
    """A file that was damaged, its copy as it was, and what was done."""

    path: Path
    copy: Path
    said: str

    def is_named_in(self, message: str) -> bool:
        """Whether an error tells which file, or which folder of few files, is meant."""
        return any(name in message for name in (str(self.path), self.path.name, str(self.path.parent)))

    def put_back(self) -> None:
        """As from a copy, where the remedy is not to remove it."""
        if self.path.parent.is_dir():
            shutil.copyfile(self.copy, self.path)


def damage(fault: Fault, run: RunFolder, repository: Path, copies: Path) -> Damaged | None:
    """Damage the fault's target; None where the run has no such file yet."""
    path = target(fault.target, run, repository)
    if path is None or not path.is_file() or not path.stat().st_size:
        return None
    copies.mkdir(exist_ok=True)
    copy = copies / f"{len(list(copies.iterdir()))}-{path.name}"
    shutil.copyfile(path, copy)
    data = bytearray(path.read_bytes())
    at = min(int(fault.size * len(data)), len(data) - 1)
    if fault.how == "truncate":
        del data[at:]
    else:
        data[at] ^= 1 << (at % 8)
    path.unlink()  # a link to it elsewhere keeps its contents
    path.write_bytes(data)
    return Damaged(path, copy, f"{fault.how} {path} at byte {at} of {copy.stat().st_size}")


def target(name: str, run: RunFolder, repository: Path) -> Path | None:
    """The file that a target of the plan means in a run as it now is; None where there is none yet."""
    checkpoints = finished(run.checkpoints)
    if name.startswith("export "):
        version = repository / "reward_model" / "1"
        return version / EXPORT[name]
    if not checkpoints:  # before the first one nothing vouches for the others
        return None
    newest = checkpoints[-1]
    done = int(newest.name.removeprefix("step-"))
    match name:
        case "checkpoint weights" | "checkpoint moments" | "checkpoint manifest" | "checkpoint DONE":
            return newest / CHECKPOINT[name]
        case "checkpoint config":
            return newest / "run_config.json"
        case "rollouts to be done again":
            return run.rollouts_file(done + 1)
        case "older rollouts":
            return run.rollouts_file(done)
        case "lineage":
            return run.lineage / f"{checkpoints[0].name}.json"
        case "prompts":
            return run.prompts / "train.jsonl"
        case "judge":
            return run.path / "judge" / "judge.safetensors"
    return {"metrics": run.metrics, "scorers": run.scorers, "config": run.config}[name]


CHECKPOINT = {
    "checkpoint weights": "model.safetensors",
    "checkpoint moments": "optimizer/rank-00000.safetensors",
    "checkpoint manifest": "manifest.json",
    "checkpoint DONE": "DONE",
}
EXPORT = {
    "export weights": "weights/model.safetensors",
    "export card": "card.json",
    "export settings": "settings.json",
    "export template": "template.jinja",
    "export code": "model.py",
}
