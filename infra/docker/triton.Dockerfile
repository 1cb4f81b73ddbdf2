# The reward model's server: NVIDIA's Triton, the packages that the models need, and this project's launcher.
#     docker build -f infra/docker/triton.Dockerfile -t alignment-triton:0.1.0 .
#     docker run --gpus all --shm-size 1g -p 127.0.0.1:8001:8001 -v $PWD/runs/triton_repo:/models:ro alignment-triton:0.1.0
# It never ran: see docs/kubernetes.md.
FROM nvcr.io/nvidia/tritonserver:25.06-py3

ENV PIP_BREAK_SYSTEM_PACKAGES=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    HF_HUB_OFFLINE=1

RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin alignment

COPY infra/docker/requirements-triton.txt /opt/requirements-triton.txt
RUN python3 -m pip install --requirement /opt/requirements-triton.txt

# Last, so that a change of the code costs a layer of a megabyte. The launcher imports the first two packages alone; for
# a repository in S3 it checks what it fetches with the third.
WORKDIR /opt/alignment
COPY alignment/ alignment/
COPY infra/ infra/
COPY models/ models/

USER 10001:10001
EXPOSE 8001 8002
ENTRYPOINT ["python3", "-m", "infra.triton", "--tritonserver", "/opt/tritonserver"]
# 0.0.0.0 is the container's own network; which ports the host opens is up to whoever runs it.
CMD ["--repository", "/models", "--follow", "--host", "0.0.0.0", "--grpc-port", "8001", "--http-port", "8000", "--metrics-port", "8002"]
