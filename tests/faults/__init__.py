"""Runs under faults: `make test-faults`, or by hand

    PYTHONPATH=tests .venv/bin/python -m faults [--seed N] [--short] [--only NAME]

A plan is drawn from a seed (`plan.py`): campaigns, each a list of faults of one setting. A campaign begins a run of the
smoke preset, does its faults one after the other (`injectors.py`, `damage.py`, `disks.py`, `s3_faults.py`), starts the
run's command anew whenever it has ended (`campaign.py`), and begins another run while faults are left. Each run has to
end equal to one that nothing disturbed (`comparison.py`), and on its way may stop with errors that name cause and
remedy (`ends.py`); `tally.py` counts. docs/faults.md says what that promises.
"""
