"""What made a checkpoint: questions to a run's folder, answered a year later.

    python -m alignment.lineage RUN              the chain from its newest checkpoint down to the base
    python -m alignment.lineage RUN --step K     the prompts of RS step K, what was selected, and why
    python -m alignment.lineage RUN --diff OTHER what differs between two runs
    python -m alignment.lineage RUN --verify     every digest, recomputed; exit status 1 where one is wrong

RUN is a run's folder, its s3:// URI, or its id under `runs/` (`latest` too). Each manifest names its parent's
weights and the sha256 of its parent's manifest, so the chain cannot be changed anywhere without changing its newest
link. All manifests are kept in `lineage/`, also of checkpoints that were pruned.
"""

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from alignment.config import parse_config, same_config, validate_config
from alignment.config_sections import RunSection
from alignment.continuation import differences, flat
from alignment.errors import AlignmentError, CheckpointError, DataError, printable
from alignment.foreign_json import read_object
from alignment.mix_in import MIX_IN
from alignment.provenance import ProvenanceShape, metrics_digest
from alignment.run_folder import RunFolder
from alignment.s3 import is_s3
from alignment.s3_objects import read_bytes
from alignment.scorers_file import checked_scorers
from alignment.workspace import find_run, opened
from models.checkpoints import finished, read_manifest, sha256_file, verify

Manifest = Mapping[str, Any]


def chain(run: RunFolder) -> list[Manifest]:
    """Manifests from the newest checkpoint down to the first, each checked against what its child says of it.

    Raises CheckpointError for a run without a checkpoint, and for a link that is missing or was changed.
    """
    folders = finished(run.checkpoints)
    if not folders:
        raise CheckpointError(f"{run.checkpoints} holds no finished checkpoint")
    links: list[Manifest] = [_checked(read_manifest(folders[-1]), folders[-1] / "manifest.json")]
    while (step := (parent := links[-1]["parent"]).get("step")) is not None:
        path = run.lineage / f"step-{step:06d}.json"
        if not path.is_file() or sha256_file(path) != parent.get("manifest_sha256"):
            raise CheckpointError(f"{path} is missing or not the one that RS step {links[-1]['step']} went on from")
        links.append(_checked(read_object(path, CheckpointError, "put the run's own back"), path))
        if links[-1]["step"] >= links[-2]["step"]:
            raise CheckpointError(f"{path} is of RS step {links[-1]['step']}, which does not come before its child's")
    return links


def describe(run: RunFolder) -> Iterator[str]:
    """Lines on what made the newest checkpoint."""
    links, validations = chain(run), run.validations()
    newest = links[0]
    yield f"checkpoint of RS step {newest['step']}, run {newest['run_id']}, weights {newest['weights_sha256']}"
    yield f"  made         {newest['created']} by {_code(newest['code'])}"
    yield "  packages     " + ", ".join(f"{name} {version}" for name, version in newest["packages"].items())
    for name in ("reward_model", "judge"):
        named = {k: v for k, v in newest[name].items() if k != "files"}
        yield f"  {name:<12} " + ", ".join(f"{k} {v}" for k, v in named.items())
    yield "  selection    " + ", ".join(f"{k} {v}" for k, v in newest["selection"].items() if v is not None)
    position = newest["position"]
    yield f"  prompts      {position['prompts_read']} read by seed {position['seed']}, in epoch {position['epoch']}"
    yield from (f"  data         {name} {digest}" for name, digest in newest["data"].items())
    yield "chain, newest first:"
    for link in links:
        steps = f"{len(link['rollouts'])} RS steps of rollouts"
        reward = f", validation reward {validations[link['step']]:.4f}" if link["step"] in validations else ""
        drawn = f" of {link['reused_rollouts']['run']}" if "reused_rollouts" in link else ""
        what = f"weights {link['weights_sha256'][:12]}, {steps}{drawn} selected by {link['selection']['strategy']}"
        yield f"  step {link['step']} of run {link['run_id']}: {what}{reward}"
    base = links[-1]["parent"]
    weights = base.get("weights_sha256") or base.get("revision") or "unknown"
    yield f"  base {base.get('model')}: weights {weights[:12]}"


def describe_step(run: RunFolder, step: int) -> Iterator[str]:
    """Lines on every response of one RS step: selected or not, its reward, and the reason. Raises DataError."""
    rows = run.read_rollouts(step)
    models = {f"{row['reward_model']} version {row['reward_model_version']}" for row in rows}
    selected = sum(row["selected"] for row in rows)
    yield f"RS step {step}: {selected} of {len(rows)} responses selected, scored by {', '.join(sorted(models))}"
    prompt_id = None
    for row in rows:
        if row["prompt_id"] != prompt_id:
            prompt_id = row["prompt_id"]
            yield f"{prompt_id}: {row['prompt']!r}"
        mark = "+" if row["selected"] else " "
        yield f" {mark} {row['rollout_index']:>3} {row['reward']:+.4f} {row['reason']}: {row['response']!r}"


def describe_difference(run: RunFolder, other: RunFolder) -> Iterator[str]:
    """Lines on what differs between two runs: config, code, packages, data, scorers, decisions, weights."""
    ours, theirs = (flat(read_object(r.config, DataError, "name a run")) for r in (run, other))
    links = [chain(r)[0] for r in (run, other)]
    for name in ("code", "packages", "data", "reward_model", "judge"):
        ours |= flat({name: links[0][name]})
        theirs |= flat({name: links[1][name]})
    found = differences(theirs, ours)
    yield f"{other.path} (there) and {run.path} (here):"
    yield from (f"  {line}" for line in found)
    step = _first_other_decision(run, other)
    common = min(links[0]["step"], links[1]["step"])
    yield (
        f"  decisions differ from RS step {step} on"
        if step
        else f"  the same decisions in all {common} common RS steps"
    )
    same = links[0]["weights_sha256"] == links[1]["weights_sha256"]
    steps = f"RS step {links[1]['step']} there, {links[0]['step']} here"
    yield f"  {'the same' if same else 'other'} weights at the end ({steps})"


def check(run: RunFolder) -> Iterator[tuple[bool, str]]:
    """Every digest of a run, recomputed: (whether it is right, what was looked at)."""
    try:
        links = chain(run)
        yield True, f"chain of {len(links)} manifests down to the base"
    except AlignmentError as error:
        yield False, f"chain: {error}"
        return
    for folder in finished(run.checkpoints):
        try:
            verify(folder)
            kept = run.lineage / f"{folder.name}.json"
            yield _same(folder / "manifest.json", kept), f"checkpoint {folder.name}, and its manifest in the chain"
        except CheckpointError as error:
            yield False, f"checkpoint {folder.name}: {error}"
    config = validate_config(read_object(run.config, DataError, "name a run"))
    # After `resume.from` the newest checkpoint may be the other run's, which had its own config and SFT mix-in.
    is_own = not config.resume.from_ or links[0]["run_id"] == run.path.name
    for name, digest in links[0]["data"].items():
        if is_own or name != MIX_IN or config.training.sft_mix is None:
            yield _matches(run.prompts / name, digest)
    for name, digest in links[0]["judge"]["files"].items():
        yield _matches(run.path / "judge" / name, digest)
    yield (
        metrics_digest(run, links[0]["step"]) == links[0]["metrics_sha256"],
        "metrics.jsonl up to the newest checkpoint",
    )
    if is_own:
        saved = finished(run.checkpoints)[-1] / "run_config.json"
        yield same_config(saved.read_bytes(), run.config.read_bytes()), "config.json, as the newest checkpoint has it"
    for link in reversed(links):
        for name, digest in link["rollouts"].items():
            yield _matches(run.rollouts / name, digest)
        for name, digest in link.get("reused_rollouts", {}).get("files", {}).items():
            yield _matches(run.reused / name, digest)
    yield from _check_reward_model(run, links[0], config.run)


def _check_reward_model(run: RunFolder, newest: Manifest, storage: RunSection) -> Iterator[tuple[bool, str]]:
    from alignment.reward_repository import read_export

    reward = checked_scorers(run)["reward_model"]
    if not reward["repository"]:
        return  # of an external server: its weights were never seen here
    what = f"reward model {reward['name']} version {reward['version']}"
    try:
        found = read_export(reward["repository"], reward["name"], reward["version"], storage).digest
    except AlignmentError as error:
        yield False, f"{what}: {error}"
        return
    yield found == newest["reward_model"].get("digest"), f"{what}, digest {found[:12]}"


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and one.read_bytes() == other.read_bytes()


def _matches(path: Path, digest: str) -> tuple[bool, str]:
    if not path.is_file():
        return False, f"{path} is missing"
    return sha256_file(path) == digest, f"{path.parent.name}/{path.name}"


def _first_other_decision(run: RunFolder, other: RunFolder) -> int | None:
    """The first RS step in which two runs read other prompts, drew other responses or chose others."""
    keys = ("prompt_id", "rollout_index", "response", "selected")
    step = 1
    while run.rollouts_file(step).exists() and other.rollouts_file(step).exists():
        ours, theirs = ([tuple(row[k] for k in keys) for row in r.read_rollouts(step)] for r in (run, other))
        if ours != theirs:
            return step
        step += 1
    return None


def _checked(manifest: Manifest, path: Path) -> Manifest:
    """The manifest if it says where its checkpoint comes from. Raises CheckpointError."""
    try:
        ProvenanceShape.model_validate(manifest)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        key = " ".join(".".join(str(part) for part in first["loc"]).split())[:80]
        raise CheckpointError(f"{path} was not written by this program: {key}: {first['msg']}") from None
    return manifest


def _code(code: Mapping[str, Any]) -> str:
    commit = f", commit {code['commit'][:12]}{' with changes' if code['dirty'] else ''}" if code["commit"] else ""
    return f"sources {code['sha256'][:12]}{commit}"


@contextlib.contextmanager
def _run(name: str) -> Iterator[RunFolder]:
    """The run's folder; of one under s3:// a copy with all its checkpoints."""
    uri = find_run("", name) if is_s3(name) else None
    if uri:
        found = read_bytes(f"{uri}/config.json")
        config = parse_config(found[0].decode() if found else "")
        # The run's workspace is a place of the nodes that it ran on.
        config = config.model_copy(update={"run": config.run.model_copy(update={"workspace": None})})
        with opened(config, uri, writes=False, all_kept=True, keeps=lambda *_: set) as run:
            yield run
        return
    for path in (Path(name), Path("runs") / name):
        if (path / "config.json").is_file():
            yield RunFolder(path.resolve())
            return
    raise DataError(f"{name}: no run folder of that name, and no run of that id in runs/")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: 0, or 1 where a digest is wrong or the run cannot be read."""
    parser = argparse.ArgumentParser(
        prog="python -m alignment.lineage", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="a run's folder, its s3:// URI, or its id under runs/")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--step", type=int, help="the decisions of this RS step")
    what.add_argument("--diff", metavar="OTHER", help="what differs from this run")
    what.add_argument("--verify", action="store_true", help="recompute every digest")
    options = parser.parse_args(arguments)
    try:
        with contextlib.ExitStack() as stack:
            return _answer(options, stack)
    except AlignmentError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1


def _answer(options: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    run = stack.enter_context(_run(options.run))
    if options.verify:
        results = list(check(run))
        print(*(f"{'ok    ' if right else 'WRONG '} {what}" for right, what in results), sep="\n")
        if all(right for right, _ in results):
            return 0
        print("what is WRONG is missing, damaged or was changed after it was written: put it back from a copy")
        return 1
    if options.step is not None:
        lines = describe_step(run, options.step)
    elif options.diff:
        lines = describe_difference(run, stack.enter_context(_run(options.diff)))
    else:
        lines = describe(run)
    print(*map(printable, lines), sep="\n")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `… | head` ends it without a word
    sys.exit(main())
