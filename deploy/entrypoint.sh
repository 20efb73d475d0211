#!/bin/sh
# Starts secura-serve with the keys that secret files hold, so that no key stands in an image, a
# compose file or a list of processes. VLLM_API_KEY_FILE=/run/secrets/x gives VLLM_API_KEY.
set -eu

for name in VLLM_API_KEY SECURA_ADMIN_API_KEY HF_TOKEN; do
  eval "file=\${${name}_FILE:-}"
  [ -n "$file" ] || continue
  # A missing key must not become a server without keys.
  [ -s "$file" ] || { echo "entrypoint: ${name}_FILE=$file: no such file, or an empty one" >&2; exit 2; }
  value="$(cat "$file")"
  export "$name=$value"
  unset "${name}_FILE"
done

# exec: signals must reach the server, which lets running answers finish.
exec secura-serve "$@"
