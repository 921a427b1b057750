# brainflow as a BIDS App: docker run IMAGE prepare /data /out participant group --atlas schaefer-400
FROM python:3.11-slim-bookworm

ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    HOME=/cache \
    NILEARN_DATA=/cache/nilearn \
    TEMPLATEFLOW_HOME=/cache/templateflow \
    BRAINFLOW_CACHE=/cache/brainflow \
    MPLCONFIGDIR=/cache/matplotlib

COPY . /src
# `torch.compile` and Triton on a GPU call a C compiler.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && python -m pip install '/src[dali,report,bids,arrays,remote,slurm,hub]' \
    && rm -rf /src \
    && useradd --uid 1000 --no-create-home --home-dir /cache brainflow \
    && install -d -m 1777 /cache /project
USER 1000
WORKDIR /project

ENTRYPOINT ["brainflow"]
CMD ["--help"]
