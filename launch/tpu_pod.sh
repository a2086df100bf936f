#!/usr/bin/env bash
#
# A run on a Cloud TPU slice of any number of hosts: makes the slice, or takes the one that is there, installs this
# checkout on all hosts, runs, follows the output, and goes on when the slice is pre-empted, until the run has ended.
#
#   launch/tpu_pod.sh NAME --zone=us-west4-a --type=v5litepod-16 --version=v2-alpha-tpuv5-lite [--spot] -- \
#       --config=configs/mae_vitl.py --workdir=/mnt/runs/mae
#   launch/tpu_pod.sh NAME --zone=us-west4-a --stop        # asks the run to save and stop
#   launch/tpu_pod.sh NAME --zone=us-west4-a --delete      # deletes the slice
#
#   --setup=COMMAND   on all hosts before the run, such as mounting the folder of the runs, which all must see
#   --project=ID      of Google Cloud, where it is not the default one
#   --restarts=N      after lost processes, at most (default: 3); pre-emptions do not count
#
# Ctrl-C ends the following only: the same command follows again. DRY=1 prints the calls of gcloud and makes none.

set -uo pipefail
exec 3>&1   # what DRY=1 prints
readonly mistake=2 stopped=75     # statuses of ssl_jax.main: it would fail again; it was asked to end early, and has saved
pause=${PAUSE:-30}                # seconds between questions
source_folder=$(cd "$(dirname "$0")/.." && pwd)

fail() {
    echo "error: $1" >&2
    exit "$mistake"
}

say() {
    echo "[launch] $1" >&2
}

name='' zone='' type='' version='' setup=true action=run restarts=3 options=() spot=()
while [ $# -gt 0 ]; do
    case $1 in
        --zone=*) zone=${1#*=} ;;
        --type=*) type=${1#*=} ;;
        --version=*) version=${1#*=} ;;
        --setup=*) setup=${1#*=} ;;
        --project=*) options+=("$1") ;;
        --restarts=*) restarts=${1#*=} ;;
        --spot) spot=(--spot) ;;
        --stop) action=stop ;;
        --delete) action=delete ;;
        --) shift; break ;;
        -*) fail "$1 is not an option: see the first lines of $0" ;;
        *) [ -z "$name" ] || fail "$1: expected one name, and -- before the arguments of ssl_jax.main"; name=$1 ;;
    esac
    shift
done
[ -n "$name" ] || fail 'expected the name of the slice'
[ -n "$zone" ] || fail '--zone is missing'
options+=("--zone=$zone" --quiet)

tpus() {
    if [ -n "${DRY:-}" ]; then
        { printf 'gcloud compute tpus'; printf ' %q' "$@" "${options[@]}"; echo; } >&3
    else
        gcloud compute tpus "$@" "${options[@]}"
    fi
}

on_hosts() {   # WHICH COMMAND
    tpus tpu-vm ssh "$name" --worker="$1" --command="$2"
}

state() {      # READY, PREEMPTED, ..., nothing where there is no slice
    tpus tpu-vm describe "$name" --format='value(state)' 2>/dev/null
}

make_slice() {
    [ -n "$type" ] && [ -n "$version" ] || fail "there is no slice $name: --type and --version are needed to make it"
    local found
    say "asking for $name ($type)"
    tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$type" --runtime-version="$version" \
        "${spot[@]}" || return
    while found=$(tpus queued-resources describe "$name" --format='value(state.state)') && [ -z "${DRY:-}" ]; do
        case $found in
            ACTIVE) return 0 ;;
            FAILED | SUSPEND*) say "$name: $found"; return 1 ;;
        esac
        say "$name: $found"
        sleep "$pause"
    done
    [ -n "${DRY:-}" ]
}

delete_slice() {
    tpus queued-resources delete "$name" --force || tpus tpu-vm delete "$name"
}

on_run() {     # WHICH ACTION [ARGUMENTS]
    local which=$1
    shift
    on_hosts "$which" "bash ssl_jax/launch/tpu_host.sh$(printf ' %q' "$@")"
}

install() {
    local archive status
    archive=${TMPDIR:-/tmp}/ssl_jax.$$.tar.gz
    say "installing on all hosts of $name"
    [ -n "${DRY:-}" ] ||
        tar -C "$source_folder" --exclude=__pycache__ -czf "$archive" \
            ssl_jax data_prep configs launch setup.py requirements.lock || return
    tpus tpu-vm scp "$archive" "$name:ssl_jax.tar.gz" --worker=all &&
        on_hosts all 'mkdir -p ssl_jax && tar -C ssl_jax -xzf ssl_jax.tar.gz' &&
        on_run all install && on_hosts all "$setup"
    status=$?
    rm -f "$archive"
    return "$status"
}

statuses() {   # of all hosts, the different ones: 'running', '0', '0 75', ''; nothing where the hosts are gone
    on_run all status | sed -n 's/^status //p' | sort -u | paste -sd' '
}

case $action in
    stop) on_run all stop; exit ;;
    delete) delete_slice; exit ;;
esac
[ $# -gt 0 ] || fail 'expected -- and the arguments of ssl_jax.main'

trap 'say "the run goes on: the same command follows it, --stop ends it"; exit 130' INT
lost=0
while :; do
    found=$(state)
    case $found in
        READY) ;;
        '') make_slice || exit 1 ;;
        PREEMPTED | TERMINATED | STOPPED | SUSPENDED) say "$name: $found"; delete_slice; make_slice || exit 1 ;;
        *) say "$name: $found"; sleep "$pause"; continue ;;
    esac
    if [ "$found" != READY ] || [[ $(statuses) != *running* ]]; then
        # It may have been pre-empted meanwhile.
        if ! install || ! on_run all start "$@"; then
            [ "$(state)" != READY ] || fail "$name: the hosts are there, but the run could not be started"
            sleep "$pause"
            continue
        fi
    fi
    on_run 0 follow
    while ended=$(statuses) && [[ $ended == *running* ]]; do
        sleep "$pause"
    done
    [ -z "${DRY:-}" ] || exit 0
    case " $ended " in
        ' 0 ') say 'the run has ended'; exit 0 ;;
        *" $mistake "*) exit "$mistake" ;;
    esac
    sleep "$pause"     # until the state says so, if the slice was pre-empted
    if [ "$(state)" != READY ]; then
        say "$name was pre-empted"
    elif [ "$ended" = "$stopped" ]; then
        say 'stopped: the same command continues'
        exit "$stopped"
    elif [ "$lost" -ge "$restarts" ]; then
        say "a process was lost; all $restarts restarts are used up"
        exit 1
    else
        lost=$((lost + 1))
        say "a process was lost: restart $lost of $restarts"
    fi
done
