#!/usr/bin/env bash
#
# What tpu_pod.sh does on every host of a slice: install, start ARGUMENTS, status, stop or follow. ~/ssl_jax is the checkout;
# ~/run has the process of the run, its output and, once it has ended, its status.

set -u
cd ~ || exit
mkdir -p run

case $1 in
    install)
        # The images' own Python may be too old.
        python3 -m pip install --quiet --user uv
        [ -d venv ] || python3 -m uv venv --quiet --python 3.11 venv
        VIRTUAL_ENV=$HOME/venv python3 -m uv pip install --quiet -e 'ssl_jax[tpu]' -c ssl_jax/requirements.lock
        ;;
    start)
        shift
        # What is left of a run that lost a host would hold the TPU.
        [ ! -f run/group ] || kill -KILL -- "-$(cat run/group)" 2>/dev/null
        rm -f run/status run/pid
        setsid nohup bash "$0" run "$@" > run/output 2>&1 < /dev/null &
        while [ ! -f run/pid ]; do sleep 0.1; done
        ;;
    run)
        shift
        echo $$ > run/group
        "${PYTHON:-$HOME/venv/bin/python}" -m ssl_jax.main "$@" &
        echo $! > run/pid
        wait $!
        echo $? > run/status
        ;;
    status)
        if [ -f run/status ]; then
            echo "status $(cat run/status)"
        elif [ -f run/pid ] && kill -0 "$(cat run/pid)" 2>/dev/null; then
            echo 'status running'
        else
            echo 'status none'
        fi
        ;;
    stop)
        kill -TERM "$(cat run/pid)"
        ;;
    follow)
        tail -n 30 -F --pid="$(cat run/pid)" run/output
        ;;
esac
