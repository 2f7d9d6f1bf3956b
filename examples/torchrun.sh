#!/usr/bin/env bash
# Trains on all GPUs of this machine, one process for each; without GPUs one process on the CPU.
#
#   examples/torchrun.sh CONFIG.toml [flags of python -m fastsd.train]
#   examples/torchrun.sh examples/many_gpus.toml --dry-run
#   NPROC=2 examples/torchrun.sh CONFIG.toml           two processes, whatever the machine has
#   RESTARTS=3 examples/torchrun.sh CONFIG.toml --run runs/mine --resume auto
#                                                      goes on from the last checkpoint, up to 3 times
#
# Rollouts from vLLM: start the servers first (examples/vllm_rollouts.toml), on GPUs that are not
# among CUDA_VISIBLE_DEVICES of this script, and add
#   --rollout.engine vllm --rollout.servers http://127.0.0.1:8000
#
# Ctrl-C and SIGTERM save a checkpoint. torchrun ends with 0 or 1; the run's own exit code (2 bad
# input, 3 no critic, 4 diverged, 5 disk) stands in the table that it prints, as "exitcode".
set -euo pipefail

nproc=${NPROC:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}
# torchrun gives each process one thread unless told otherwise: too few where the CPU does the work.
cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > nproc ? cores / nproc : 1))}
# How long processes may take to save after SIGTERM (torch 2.13 and later; before, 30 s).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}

# --standalone picks a free port, so that two runs on one machine do not meet. The -- after -m is
# needed: without it torchrun takes flags such as --run for its own.
exec torchrun --standalone --nproc-per-node "$nproc" --max-restarts "${RESTARTS:-0}" \
    -m -- fastsd.train "$@"
