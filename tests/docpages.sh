# SPDX-License-Identifier: Apache-2.0
# The world in which the documentation's code blocks run (tests/docpages.py): called in name spaces of its own, with the
# directory that has the script and is its working directory, and the Python that has ringbar.
set -eEu -o pipefail
work=$1 python=$2
export work python TOP
TOP=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# ---- what a host has ------------------------------------------------------------------------------------------------

mount --make-rprivate /
while read -r _ directory kind _; do # clusters of others may lie there, and their processes are not seen from here
    [ "$kind" != hugetlbfs ] || umount -l "$directory"
done </proc/self/mounts
mkdir -p /run/ringbar
mount -t tmpfs none /run/ringbar
mount -t tmpfs none /dev/shm
mkdir /run/ringbar/.over
mount -t tmpfs none /run/ringbar/.over
for directory in etc usr/local; do # written to, and as before afterwards
    mkdir -p "/run/ringbar/.over/$directory/new" "/run/ringbar/.over/$directory/work"
    mount -t overlay -o "lowerdir=/$directory,upperdir=/run/ringbar/.over/$directory/new,workdir=/run/ringbar/.over/$directory/work" \
        none "/$directory"
done
umount -l /run/ringbar/.over
rmdir /run/ringbar/.over
ip link set lo up
for n in 1 2; do
    ip link add "eth$n" type veth peer name "wire$n"
    ip link set "eth$n" up
    ip link set "wire$n" up
done

# ---- what a reader has ----------------------------------------------------------------------------------------------

mkdir "$work/bin" "$work/terminals"
for name in ringbar meson; do
    printf '#!/bin/sh\nPYTHONSAFEPATH=1 exec "%s/%s" "$@"\n' "$(dirname "$python")" $name >"$work/bin/$name"
done
for name in ssh scp; do # vm1 is known to them
    printf '#!/bin/sh\nexec /usr/bin/%s -F "%s/ssh_config" "$@"\n' $name "$work" >"$work/bin/$name"
done
chmod +x "$work"/bin/*
PATH=$work/bin:$(dirname "$python"):$PATH

ringbar() { # as typed; who reads on presses Ctrl-C some time
    local word
    case $1 in
    agent | count | send | bridge | balance | fanout | merge | delay | replicate | pipeline | capture | tap | events | top)
        for word in "$@"; do
            case $word in --packets | --seconds | --background | --once | --help) command ringbar "$@" && return || return ;; esac
        done
        [ "$1" != events ] || [[ " $* " == *" --follow "* ]] || { command ringbar "$@" && return || return; }
        timeout --foreground --preserve-status -s INT 2 "$work/bin/ringbar" "$@"
        ;;
    *) command ringbar "$@" ;;
    esac
}

open=() # the terminals: process, descriptor of the keyboard
terminal() { # name of the file with the commands
    local keys screen=$work/terminals/$1 process
    mkfifo "$screen.keys"
    exec {keys}<>"$screen.keys"
    # No child of this shell, which may `wait` for its own.
    process=$(script -qefc "bash -eu $work/$1" "$screen" <&"$keys" >/dev/null 2>&1 & echo $!)
    open=("$process $keys" "${open[@]}")
    for _ in $(seq 1200); do
        kill -0 "$process" 2>/dev/null || break
        sleep 0.1
        [ "$(cat "$screen" 2>/dev/null | wc -l)" -gt 1 ] || continue # the first line is script's own
        sleep 0.5 # an error may have been all that it had to say
        ! kill -0 "$process" 2>/dev/null || return 0
    done
    echo "terminal $1 shows nothing, or has ended"
    return 1
}

paste_from_terminal() { # names of variables: their lines, as the last terminal shows them, pasted into this shell
    local screen name
    screen=$(find "$work/terminals" -type f -printf '%T@ %p\n' | sort -n | tail -n 1 | cut -d' ' -f2)
    for name in "$@"; do # for the terminals to come, too
        eval "export $(tr -d '\r' <"$screen" | grep "^$name=")"
    done
}

agent() { # `ringbar agent` runs in another terminal
    echo 'exec ringbar agent' >"$work/agent"
    terminal agent
}

vm() { # boot vm1, a VM without ringbar, for what runs `in the VM`; its monitor is $VM
    cat >"$work/vm.py" <<'PYTHON'
from ringbar.qemu.launch import Guest
with Guest.start("vm1") as vm:
    vm.wait_up()
    print(f"VM={vm.qmp}\nCONFIG={vm.ssh_config}", flush=True)
    input()
PYTHON
    echo "exec $python -P $work/vm.py" >"$work/vm"
    terminal vm
    paste_from_terminal VM CONFIG
    ln -s "$CONFIG" "$work/ssh_config"
}

in_the_vm() { # name of the file with the commands
    { echo 'set -eu'; cat "$work/$1"; } | ssh root@vm1 sh -s
}

at() {
    here=$1
    echo "### $here"
}

ended() { # newest first: Enter for who waits for it, then Ctrl-C
    local status=$? process keys socket each
    trap - EXIT ERR
    set +eE
    [ $status -eq 0 ] || echo "FAILED at ${here:-the beginning} with $status"
    for socket in /run/ringbar/workers/*.sock; do
        [ ! -e "$socket" ] || command ringbar worker stop "$(basename "$socket" .sock)" >/dev/null
    done
    for each in "${open[@]}"; do
        read -r process keys <<<"$each"
        for each in '\n' '\003' '\003'; do
            printf "$each" >&"$keys"
            for _ in $(seq 20); do
                kill -0 "$process" 2>/dev/null && sleep 0.1 || break 2
            done
        done
        kill -9 "$process" 2>/dev/null
    done
    exit $status
}
trap ended EXIT

. "$work/script"
