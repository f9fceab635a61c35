# A hospital's part. Built from the root of the source: docker build -f docker/site.Dockerfile -t gapweave-site:0.1.0 .
# The steps up to the health check's are those of server.Dockerfile: an engine runs them once for both.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

# The index that has torch; empty: the one that has all else. Torch has one for each version of CUDA, and one for CPUs.
ARG TORCH_INDEX=

WORKDIR /opt/gapweave
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch \
    && pip install --no-cache-dir -c constraints.txt setuptools
COPY pyproject.toml README.md LICENSE ./
COPY shared/ shared/
COPY client/ client/
COPY server/ server/
COPY sites/ sites/
RUN pip install --no-cache-dir --no-build-isolation -c constraints.txt .

COPY docker/health.py ./
# `images` and `sql`: DICOM files and databases.
RUN pip install --no-cache-dir --no-build-isolation -c constraints.txt '.[images,sql]' \
    && groupadd --gid 10001 gapweave \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /site gapweave \
    && install -d -m 0700 -o 10001 -g 10001 /site
# What libraries keep for themselves goes to /tmp: the root may be read-only.
ENV HOME=/site MPLCONFIGDIR=/tmp/matplotlib XDG_CACHE_HOME=/tmp/cache
USER 10001:10001
WORKDIR /site
HEALTHCHECK --interval=30s --timeout=10s --start-period=90s --retries=3 \
    CMD ["python", "/opt/gapweave/health.py", "/site/site.yaml"]
ENTRYPOINT ["gapweave", "site", "start", "--foreground", "/site/site.yaml"]
