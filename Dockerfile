# mr1_fast with its CUDA kernels and the tested versions of what it needs; docs/installation.md has
# the commands. NVIDIA's driver on the host must know CUDA 13.
ARG CUDA=13.0.2

FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04 AS build
# The distribution's current patches are wanted, not one version.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE ./
COPY csrc csrc
COPY mr1_fast mr1_fast
# No GPU takes part: nvcc compiles for every architecture in setup.py.
RUN python3 -m venv /opt/build \
    && /opt/build/bin/pip wheel --no-cache-dir --no-deps -w /wheels .

FROM nvidia/cuda:${CUDA}-base-ubuntu24.04
# Triton compiles the launch of a kernel with gcc and Python's headers at run time.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
COPY constraints.txt /opt/constraints.txt
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    python3 -m venv /opt/mr1_fast \
    && /opt/mr1_fast/bin/pip install --no-cache-dir -c /opt/constraints.txt \
        "$(echo /wheels/mr1_fast-*.whl)[gpu]"
ENV PATH=/opt/mr1_fast/bin:$PATH
# Mount a folder here: runs, and the caches of models and kernels, stay in it.
WORKDIR /work
RUN useradd --uid 1001 --no-create-home --home-dir /work --no-log-init mr1 && chown mr1 /work
# With `docker run --user` there is no entry in /etc/passwd that would tell either.
ENV HOME=/work USER=mr1
USER 1001
ENTRYPOINT ["mr1"]
CMD ["--help"]
