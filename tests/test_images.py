"""The images and the compose file, by a linter and by rules of our own: no container engine runs them here."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from infra.triton_options import parser

ROOT = Path(__file__).resolve().parent.parent
DOCKER = ROOT / "infra" / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
EXACT_TAG = r"[\w./-]+:v?\d[\w.-]*\d[\w.-]*"
SECRET = r"(?i)(password|passwd|secret|token|api_?key|access_?key)\s*[=:]"


def instructions(path: Path) -> list[tuple[str, str]]:
    """(KEYWORD, rest) of each instruction, continued lines joined, comments left out."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split(None, 1)[0].upper(), line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


def pins(path: Path) -> dict[str, str]:
    """Package to its exact version."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith(("#", "-r"))]
    assert all(re.fullmatch(r"[\w\[\].-]+==[\w.]+", line) for line in lines), lines
    return dict(line.split("==") for line in lines)


def hadolint(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert program is not None, "hadolint is missing: `pip install -r requirements-dev.txt`"
    return subprocess.run([program, *arguments], input=stdin, text=True, capture_output=True, timeout=60, check=False)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_the_linter_finds_nothing(path: Path) -> None:
    done = hadolint("--no-color", str(path))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_linter_finds_what_is_wrong() -> None:
    done = hadolint("--no-color", "-", stdin="FROM python:latest\nRUN pip install torch\n")
    assert done.returncode == 1 and "DL3007" in done.stdout and "DL3013" in done.stdout


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_images_have_exact_bases_a_plain_user_and_no_secrets(path: Path) -> None:
    found = instructions(path)
    assert all(re.fullmatch(EXACT_TAG, rest.split()[0]) for keyword, rest in found if keyword == "FROM")
    users = [rest for keyword, rest in found if keyword == "USER"]
    # By number, so that Kubernetes can see that it is not root.
    assert users == ["10001:10001"]
    assert not any(keyword == "ADD" for keyword, _ in found)
    assert not any(keyword in ("ENV", "ARG") and re.search(SECRET, rest) for keyword, rest in found)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_what_is_copied_is_there_and_is_let_in(path: Path) -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for keyword, rest in instructions(path):
        if keyword == "COPY" and not rest.startswith("--from="):
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert source.split("/")[0] in allowed, source
    assert (ROOT / ".dockerignore").read_text().splitlines()[1] == "*"


def test_the_trainers_image_holds_all_that_a_flow_needs(tmp_path: Path) -> None:
    """The preset of Slurm wants the most: a decorator of the project's own."""
    for keyword, rest in instructions(DOCKER / "trainer.Dockerfile"):
        source, target = rest.split()[0], rest.split()[-1]
        if keyword == "COPY" and source == target:
            shutil.copytree(ROOT / source, tmp_path / target, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "flows/rs_flow.py", "--config", "config", "configs/slurm.yaml", "show"],
        cwd=tmp_path, text=True, capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "Step iterate" in done.stdout + done.stderr, done.stdout + done.stderr


def test_the_servers_packages_have_the_runs_versions() -> None:
    ours, all_of_a_run = pins(DOCKER / "requirements-triton.txt"), pins(ROOT / "requirements.txt")
    assert ours.items() <= all_of_a_run.items()
    # What model.py imports, and the launcher's client.
    needed = {"torch", "transformers", "numpy", "Jinja2", "safetensors", "tritonclient[grpc]"}
    assert needed <= set(ours)


def launcher_options(words: list[str]):
    return parser().parse_args(words)


def test_the_servers_image_starts_the_launcher_with_arguments_that_it_takes() -> None:
    found = dict(instructions(DOCKER / "triton.Dockerfile"))
    entry, arguments = yaml.safe_load(found["ENTRYPOINT"]), yaml.safe_load(found["CMD"])
    assert entry[:3] == ["python3", "-m", "infra.triton"]
    options = launcher_options([*entry[3:], *arguments])
    assert str(options.tritonserver) == "/opt/tritonserver" and options.host == "0.0.0.0"
    assert found["EXPOSE"].split() == [str(options.grpc_port), str(options.metrics_port)]


def test_the_launcher_imports_what_the_servers_image_copies() -> None:
    """Run from a folder that holds these two packages alone, and no heavy one of a run."""
    code = (
        "import sys, infra.triton, infra.triton_canary, alignment.scoring;"
        "print({m.split('.')[0] for m in sys.modules} & {'models', 'flows', 'metaflow', 'deepspeed', 'pydantic'})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=60, check=False
    )
    assert done.stdout == "set()\n", done.stdout + done.stderr


def test_a_repository_in_s3_is_served_with_what_the_servers_image_holds() -> None:
    """What fetches and checks a version imports no package of a run's that the image lacks."""
    lacking = {"metaflow", "wandb", "gguf", "pytriton"}
    code = (
        "import sys, alignment.reward_repository, alignment.model_cache, models.reward_export;"
        f"print({{m.split('.')[0] for m in sys.modules}} & {lacking})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=60, check=False
    )
    assert done.stdout == "set()\n", done.stdout + done.stderr


def test_compose_services_are_pinned_hardened_and_open_to_this_machine_alone() -> None:
    for name, service in COMPOSE["services"].items():
        assert re.fullmatch(EXACT_TAG, service["image"]), name
        assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"], name
        assert service.get("read_only") or name == "trainer", name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
        assert not re.search(SECRET, yaml.safe_dump(service)), name
        assert not set(service) & {"privileged", "network_mode", "pid", "env_file"}, name
        assert set(service.get("depends_on", ())) <= set(COMPOSE["services"]), name


def test_compose_mounts_and_builds_what_is_there() -> None:
    for service in COMPOSE["services"].values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source in COMPOSE["volumes"] or (DOCKER / source).is_file(), source
        if "build" in service:
            assert (DOCKER / service["build"]["context"]).resolve() == ROOT
            assert (ROOT / service["build"]["dockerfile"]).is_file()


def test_compose_scores_where_the_server_listens_and_scrapes_what_it_starts() -> None:
    services = COMPOSE["services"]
    options = launcher_options(services["reward-model"]["command"])
    assert f"reward.url=reward-model:{options.grpc_port}" in services["trainer"]["command"]
    prometheus = yaml.safe_load((ROOT / "infra" / "monitoring" / "prometheus.yml").read_text())
    targets = {t for job in prometheus["scrape_configs"] for s in job["static_configs"] for t in s["targets"]}
    assert targets == {f"reward-model:{options.metrics_port}", "run-progress:9100"}
    assert {target.split(":")[0] for target in targets} <= set(services)
