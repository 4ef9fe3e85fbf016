#!/usr/bin/env bash
# Data parallel on this machine: launchers/torchrun.sh PROCESSES key=value ...
set -euo pipefail
processes=${1:?usage: launchers/torchrun.sh PROCESSES key=value ...}
shift
exec torchrun --standalone --nproc_per_node "$processes" train.py parallel=ddp "$@"
