"""Where the system runs: the local Triton launcher, containers, clusters, dashboards."""
