# Everything that the tests need, with the project mounted. From the root of the project:
#   docker build -f deploy/dev.Dockerfile -t pothead-dev --build-arg UID="$(id -u)" .
#   docker run --rm -it -v "$PWD:/src" pothead-dev            # all of it, as CI runs it
#   docker run --rm -it -v "$PWD:/src" pothead-dev pytest -q  # the tests alone

FROM python:3.13-bookworm
# What the README's commands and the tests call; a test whose program is missing is skipped.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends --yes \
        chromium curl ffmpeg haproxy iproute2 nginx-light nodejs prometheus xz-utils \
    && rm -rf /var/lib/apt/lists/*
# hadolint ignore=DL3013
RUN pip install --no-cache-dir tox pytest setuptools prometheus-client psutil pyyaml
# Files in the mounted project stay yours.
ARG UID=1000
RUN useradd --create-home --uid "$UID" dev
USER $UID
WORKDIR /src
CMD ["tox"]
