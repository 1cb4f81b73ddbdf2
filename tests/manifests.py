"""Kubernetes manifests as the API server would get them: files as they are, or rendered by kustomize."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
MANIFESTS = ROOT / "infra" / "kubernetes"


def objects_of(text: str) -> list[dict]:
    return [one for one in yaml.safe_load_all(text) if one is not None]


def rendered(folder: Path) -> list[dict]:
    """What `kubectl kustomize FOLDER` prints."""
    done = subprocess.run(
        ["kubectl", "kustomize", str(folder)], text=True, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return objects_of(done.stdout)


def rendered_together(tmp_path: Path, kustomization: str) -> list[dict]:
    """A kustomization of a user's own, whose paths begin with `alignment/`, this repository's clone."""
    # kustomize takes relative paths alone.
    here = os.path.relpath(ROOT, tmp_path)
    (tmp_path / "kustomization.yaml").write_text(kustomization.replace("alignment/infra/", f"{here}/infra/"))
    return rendered(tmp_path)


def only(objects: Sequence[dict], kind: str, name: str = "reward-model") -> dict:
    """The one object of a kind and name."""
    found = [one for one in objects if one["kind"] == kind and one["metadata"]["name"] == name]
    assert len(found) == 1, [(one["kind"], one["metadata"]["name"]) for one in objects]
    return found[0]
