"""The launcher as a container runs it: an installed server, an address for the network, a canary for the probes."""

import shutil
import sys
from pathlib import Path

import pytest

from infra import triton, triton_canary, triton_options
from infra.triton_setup import Ports, _wheel, free_ports, prepare
from reward_fixtures import export_tiny, served_repository


def installed_server(folder: Path) -> Path:
    """Stands in for /opt/tritonserver of NVIDIA's image: the wheel's files in the image's places."""
    wheel, _ = _wheel()
    backend = folder / "backends" / "python"
    backend.mkdir(parents=True)
    (folder / "bin").symlink_to(wheel / "bin")
    for name in ("libtriton_python.so", "triton_python_backend_utils.py"):
        (backend / name).symlink_to(wheel / "backends" / "python" / name)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copy2(wheel / "python_backend_stubs" / python / "triton_python_backend_stub", backend)
    return folder


def test_an_installed_server_is_opened_to_the_network_and_its_canary_answers(tmp_path, monkeypatch, capfd):
    export_tiny(tmp_path / "triton_repo")
    server = installed_server(tmp_path / "tritonserver")
    monkeypatch.setenv("LD_LIBRARY_PATH", _wheel()[1])  # as the image sets its own
    with served_repository(tmp_path / "triton_repo", "--tritonserver", str(server), "--host", "0.0.0.0") as running:
        host, _, port = running.url.rpartition(":")
        assert host == "0.0.0.0" and running.metrics_url.startswith("http://0.0.0.0:")
        # A server that listens on 127.0.0.1 alone would not be there.
        assert triton_canary.main(["--model", "reward_model", "--url", f"127.0.0.2:{port}"]) == 0
        assert triton_canary.main(["--model", "other", "--url", f"127.0.0.1:{port}", "--within", "1"]) == 1
    assert "other at 127.0.0.1:" in capfd.readouterr().err


def test_nobody_at_the_address_fails_the_probe(capsys):
    port = free_ports(1)[0]
    assert triton_canary.main(["--model", "m", "--url", f"127.0.0.1:{port}", "--within", "0.5"]) == 1
    assert f"m at 127.0.0.1:{port} has not answered within 0.5 s" in capsys.readouterr().err


def test_a_folder_without_a_server_is_named(tmp_path, capfd):
    export_tiny(tmp_path / "repository")
    arguments = ["--repository", str(tmp_path / "repository"), "--tritonserver", str(tmp_path)]
    assert triton.main(arguments) == 1
    assert f"--tritonserver ({tmp_path}) holds no bin/tritonserver" in capfd.readouterr().err


def test_an_address_that_is_none_is_refused(capsys):
    with pytest.raises(SystemExit):
        triton_options.parser().parse_args(["--repository", "r", "--host", "localhost"])
    assert "'localhost' is no IPv4 address: give e.g. 127.0.0.1 or 0.0.0.0" in capsys.readouterr().err


def test_loopback_is_the_default(tmp_path):
    (tmp_path / "repository").mkdir()
    prepared = prepare(tmp_path / "scratch", {}, tmp_path / "repository", Ports(1, 2, 3), "prefix")
    assert {word for word in prepared.command if "-address=" in word} == {
        f"--{kind}-address=127.0.0.1" for kind in ("grpc", "http", "metrics")
    }
    assert triton_options.parser().parse_args(["--repository", "r"]).host == "127.0.0.1"
    assert Ports(1, 2, 3, "0.0.0.0").url == "127.0.0.1:1" and Ports(1, 2, 3, "10.0.0.5").url == "10.0.0.5:1"
