# The hub. Built from the root of the source: docker build -f docker/server.Dockerfile -t gapweave-server:0.1.0 .
# The steps up to the reverse proxy are those of site.Dockerfile: an engine runs them once for both.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

# The index that has torch; empty: the one that has all else. A hub needs no GPU: name torch's index of CPU builds.
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

# The reverse proxy. Debian keeps the newest version of a package only: a pinned one could not be built for long.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends nginx-light \
    && rm -rf /var/lib/apt/lists/*

RUN groupadd --gid 10001 gapweave \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /hub gapweave \
    && install -d -m 0700 -o 10001 -g 10001 /hub
# What libraries keep for themselves goes to /tmp: the root may be read-only.
ENV HOME=/hub GAPWEAVE_HUB=/hub MPLCONFIGDIR=/tmp/matplotlib XDG_CACHE_HOME=/tmp/cache
USER 10001:10001
WORKDIR /hub
HEALTHCHECK --interval=30s --timeout=10s --start-period=90s --retries=3 \
    CMD ["gapweave", "server", "status"]
ENTRYPOINT ["gapweave", "server", "start", "--foreground"]
