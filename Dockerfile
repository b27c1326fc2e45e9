# One image for all services; the command chooses which. `--target demo`: the scripted storage node, which production does not need.

FROM python:3.12-slim AS build
WORKDIR /build
RUN python3 -m venv /opt/distributor
# `tracing` instead of `runtime`: with the packages that send traces to an OpenTelemetry collector.
ARG REQUIREMENTS=runtime
COPY requirements/$REQUIREMENTS.txt requirements/$REQUIREMENTS.hashed.txt requirements/
# An index of your own may serve wheels that it has built itself: then the pins are installed without hashes.
RUN set -- /opt/distributor/bin/pip install --no-cache-dir --disable-pip-version-check --no-compile --only-binary :all: --no-deps; \
    "$@" --require-hashes --requirement "requirements/$REQUIREMENTS.hashed.txt" \
    || { echo "the index serves other files than those of $REQUIREMENTS.hashed.txt: installing without hashes" >&2; "$@" --requirement "requirements/$REQUIREMENTS.txt"; }
COPY pyproject.toml README.md LICENSE ./
COPY shared shared
COPY services services
COPY distributor_node distributor_node
RUN /opt/distributor/bin/pip install --no-cache-dir --disable-pip-version-check --no-compile --no-deps . \
    && /opt/distributor/bin/pip check

# The modules that every hit runs through, as extension modules. What compiles them stays in this stage. Everything works
# without them: `--build-arg COMPILE=no` needs no Debian package.
FROM build AS compile
ARG COMPILE=yes
COPY requirements/compile.txt requirements/compile.hashed.txt requirements/
COPY deploy/release/compile_fast_path.py ./
RUN mkdir /extensions && [ "$COMPILE" = no ] || { \
        apt-get update -qq \
        && apt-get install -qq --yes --no-install-recommends gcc libc6-dev >/dev/null \
        && set -- /opt/distributor/bin/pip install --no-cache-dir --disable-pip-version-check --only-binary :all: --no-deps \
        && { "$@" --require-hashes --requirement requirements/compile.hashed.txt || "$@" --requirement requirements/compile.txt; } \
        && mkdir sources && cp -rL distributor_node pyproject.toml sources \
        && /opt/distributor/bin/python compile_fast_path.py sources \
        && cd sources && find . -name '*.so' -exec strip {} + -exec cp --parents -t /extensions {} +; }

FROM build AS install
COPY --from=compile /extensions /opt/distributor/lib/python3.12/site-packages
# The root file system is read-only at run time, so the byte code is made here; pip is of no use there.
RUN /opt/distributor/bin/pip uninstall --quiet --yes pip \
    && python3 -m compileall -q /opt/distributor/lib

FROM python:3.12-slim AS runtime
RUN groupadd --gid 10001 distributor \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin distributor \
    && install --directory --owner 10001 --group 10001 --mode 0750 /var/lib/distributor
COPY --from=install /opt/distributor /opt/distributor
ENV PATH=/opt/distributor/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    DISTRIBUTOR_STORAGE__PATH=/var/lib/distributor \
    HEALTH_URL=http://127.0.0.1:9463/healthz
USER 10001:10001
WORKDIR /
EXPOSE 3334 3336 9463 9464 9465
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request; urllib.request.urlopen(os.environ['HEALTH_URL'], timeout=4)"]
ENTRYPOINT ["distributor"]
CMD ["api"]

FROM runtime AS demo
COPY services/demo /opt/distributor/lib/python3.12/site-packages/distributor_node/services/demo
ENTRYPOINT ["python3", "-m", "distributor_node.services.demo.storage_node"]
CMD []

# The last stage is what `docker build` makes.
FROM runtime AS node
ARG VERSION=local
ARG REVISION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.title="distributor-node" \
      org.opencontainers.image.description="Serves media objects from a bounded cache that is filled on demand from storage nodes" \
      org.opencontainers.image.licenses="GPL-3.0-only" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.created="$CREATED"
