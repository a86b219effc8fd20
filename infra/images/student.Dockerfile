# The student's nodes: DeepSpeed, no vLLM. Everything but the lock is as in teacher.Dockerfile (a test compares).
#   docker build -f infra/images/student.Dockerfile -t REPOSITORY:TAG .
# torch brings CUDA 13.0 of its own; the base has the same, with the compiler that kernels made at run time want.
ARG BASE=nvidia/cuda:13.0.3-devel-ubuntu22.04
FROM ${BASE}

ARG PYTHON_VERSION=3.11.18
ARG UV_VERSION=0.13.9

# wget: KubeRay's probes call it. gcc: Triton builds its launchers with it.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates gcc g++ libc6-dev python3-pip wget \
    && rm -rf /var/lib/apt/lists/*

ENV UV_PYTHON_INSTALL_DIR=/opt/python \
    UV_COMPILE_BYTECODE=1 \
    UV_LINK_MODE=copy \
    PATH=/opt/venv/bin:${PATH} \
    VIRTUAL_ENV=/opt/venv

RUN pip3 install --no-cache-dir "uv==${UV_VERSION}" \
    && uv python install "${PYTHON_VERSION}" \
    && uv venv --python "${PYTHON_VERSION}" /opt/venv

# The lock is complete: nothing is resolved here. DeepSpeed comes as source, and builds no operator (CUDA's are not used).
COPY requirements/student-gpu.lock /opt/distill-ray/requirements.lock
RUN DS_BUILD_OPS=0 uv pip install --no-cache --no-deps --require-hashes --requirement /opt/distill-ray/requirements.lock

COPY pyproject.toml README.md LICENSE /opt/distill-ray/
COPY distill_ray /opt/distill-ray/distill_ray
RUN uv pip install --no-cache --no-deps --no-build-isolation /opt/distill-ray \
    && distill-ray --help > /dev/null

RUN useradd --uid 1000 --create-home --shell /bin/bash ray
USER 1000
WORKDIR /home/ray
ENV RAY_USAGE_STATS_ENABLED=0
