# SPDX-License-Identifier: Apache-2.0
# Sourced by the scripts beside it: where things are, and how a long step is shown.
set -euo pipefail
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$top"
venv=$top/.venv
logs=$top/build/log
mkdir -p "$logs"

say() { printf '==> %s\n' "$*"; }

fail() { # message, cure
    printf 'error: %s\n' "$1" >&2
    [ $# -lt 2 ] || printf '       %s\n' "$2" >&2
    exit 1
}

# step NAME TEXT COMMAND...: run it with its output in build/log/NAME.log; a sign of life every 20 seconds; the end of
# the log when it fails.
step() {
    local name=$1 text=$2 log=$logs/$1.log began=$SECONDS ticker status=0
    shift 2
    say "$text"
    while sleep 20 >/dev/null 2>&1; do # quiet, or a pipe of ours stays open as long as it sleeps
        printf '    %d s: %s\n' $((SECONDS - began)) "$(tail -n 1 "$log" | tr -d '\r' | cut -c1-100)"
    done &
    ticker=$!
    "$@" >"$log" 2>&1 </dev/null || status=$?
    kill "$ticker"
    wait "$ticker" 2>/dev/null || :
    if [ "$status" -ne 0 ]; then
        tail -n 40 "$log" >&2
        fail "$name failed (exit status $status)" "the whole output: $log"
    fi
    [ $((SECONDS - began)) -lt 3 ] || printf '    done in %d s\n' $((SECONDS - began))
}
