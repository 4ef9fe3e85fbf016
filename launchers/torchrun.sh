#!/usr/bin/env bash
# Several processes on this machine: launchers/torchrun.sh PROCESSES key=value ...   (parallel=ddp unless typed)
set -euo pipefail
processes=${1:?usage: launchers/torchrun.sh PROCESSES key=value ...}
shift
case " $*" in *" parallel="* | *" experiment="*zero3*) how=() ;; *) how=(parallel=ddp) ;; esac
exec torchrun --standalone --nproc_per_node "$processes" -m sftx train "${how[@]}" "$@"
