#!/usr/bin/env bash
# A stranger's day of use: chat, save, kill, restore, serve with eight clients for ten minutes, shift past the context three times. Ends with "no wrong
# answer" or says what was wrong.
#
#   benchmarks/strangers_day.sh MODEL [MINUTES]
#
# Needs gearcpp[server]. Every answer is greedy, so each client knows what it must get: what the server said when it was alone.
set -euo pipefail

if [ $# -lt 1 ] || [ ! -f "$1" ]; then
    sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
model=$1 minutes=${2:-10}
work=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server" 2>/dev/null || true; rm -rf "$work"' EXIT

echo "== chat, and save"
printf 'Once upon a time\n/save %s/session\n' "$work" | gearcpp chat -m "$model" -c 4096 --temp 0 -n 1500 >"$work/chat.txt"
test -s "$work/session" || { echo "the session was not saved"; exit 1; }

echo "== killed while it saves again and again: the file is whole each time"
for _ in 1 2 3 4 5; do
    python3 - "$model" "$work/session" <<'PYTHON' &
import sys, gearcpp
llm = gearcpp.Llama(sys.argv[1], n_ctx=4096, verbose=False)
llm.load_session(sys.argv[2])
while True:
    llm.save_session(sys.argv[2])
PYTHON
    saver=$!
    sleep "$(python3 -c 'import random; print(4 + random.random())')"
    kill -9 "$saver"
    wait "$saver" 2>/dev/null || true
done

echo "== restore, and three times past the context"
python3 - "$model" "$work/session" <<'PYTHON'
import sys
import numpy as np
import gearcpp
llms = []
for _ in range(2):
    llm = gearcpp.Llama(sys.argv[1], n_ctx=4096, n_batch=256, verbose=False)
    llm.load_session(sys.argv[2])
    assert llm.n_tokens > 20, "the session is empty"
    llms.append(llm)
tokens = llms[0].tokenize(b"The house stood at the end of the lane, and nobody had lived in it for years. ", add_bos=False)
n_shift = 0
while n_shift < 3 * 2:  # each drops half of the context
    for llm in llms:
        if llm.n_tokens + len(tokens) >= llm.n_ctx():
            llm.shift_context(4, llm.n_tokens // 2)
            n_shift += llm is llms[0]
        llm.eval(tokens)
a, b = (np.ctypeslib.as_array(llm._ctx.get_logits(), (llm.n_vocab(),)) for llm in llms)
assert np.isfinite(a).all() and (a == b).all(), "two contexts with the same past disagree"
PYTHON

echo "== eight clients for $minutes minutes"
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
gearcpp serve -m "$model" -c 8192 --parallel 8 --port "$port" >"$work/server.txt" 2>&1 &
server=$!
python3 - "$port" "$minutes" <<'PYTHON'
import json, sys, threading, time, urllib.error, urllib.request

url, end = f"http://127.0.0.1:{sys.argv[1]}", time.monotonic() + 60 * float(sys.argv[2])
prompts = [f"Chapter {i}. {text}" for i, text in enumerate(["The sea was", "Once upon a time", "In the old house", "A letter came"] * 2)]


def ask(prompt):
    body = json.dumps({"prompt": prompt, "max_tokens": 24, "temperature": 0}).encode()
    with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"}), timeout=300) as answer:
        return json.load(answer)["choices"][0]["text"]


for _ in range(120):
    try:
        urllib.request.urlopen(f"{url}/health", timeout=5).close()
        break
    except OSError:
        time.sleep(0.5)
expected = [ask(prompt) for prompt in prompts]
n, wrong, lock = 0, [], threading.Lock()


def client(i):
    global n
    while time.monotonic() < end:
        try:
            text = ask(prompts[i])
        except OSError as error:
            text = repr(error)
        with lock:
            n += 1
            if text != expected[i]:
                wrong.append((i, text, expected[i]))


threads = [threading.Thread(target=client, args=(i,)) for i in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(f"{n} answers, {len(wrong)} other than when the server was alone")
for i, text, alone in wrong[:3]:
    print(f"client {i}: {text!r} instead of {alone!r}")
sys.exit(bool(wrong))
PYTHON
echo "no wrong answer"
