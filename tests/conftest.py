"""Fixtures that several test files share."""

import signal

import pytest

from reward_fixtures import served_reward_model
from s3_fixtures import bucket, ceph_server, flaky, moto_server, server_name
from slurm_fixtures import cluster, slurm_exports, slurm_reward_model, slurm_undisturbed

__all__ = [
    "bucket",
    "ceph_server",
    "cluster",
    "flaky",
    "moto_server",
    "served_reward_model",
    "server_name",
    "slurm_exports",
    "slurm_reward_model",
    "slurm_undisturbed",
]

# A shell that starts its commands in the background makes them deaf to Ctrl-C, and their children too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--screenshots", metavar="DIR", help="where the pictures of the docs are kept")
    parser.addoption("--no-skips", action="store_true", help="a test that skips fails, by its reason")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    report = yield
    if report.skipped and item.config.getoption("--no-skips"):
        report.outcome, report.longrepr = "failed", f"skipped: {report.longrepr[2]}"
    return report
