#!/usr/bin/env bash
# One training on several machines of a cluster with Slurm, with a process for each GPU.
#
#   sbatch --nodes=2 accelerate_configs/slurm.sh --config recipes/upernet-convnext-small.yaml --output_dir runs/upernet
#
# Submit it in the folder of the project, from a shell in which `accelerate` works. All machines must share this folder,
# the dataset and --output_dir. All words after slurm.sh go to run_segmentation.py. CONFIG_FILE names another
# configuration than accelerate_configs/multi_node.yaml.
#
# Two minutes before the time limit, Slurm sends a signal to this script. It stops the training and puts the job back
# into the queue. The job then goes on from the last checkpoint. The same happens after a preemption or the failure of a
# machine.
#SBATCH --job-name=gi-tract
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

export CONFIG_FILE=${CONFIG_FILE:-accelerate_configs/multi_node.yaml}
# One name per line. A pipe to `head` could end `scontrol` before it has printed all names, which would count as an error.
machines=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MAIN_PROCESS_IP=${machines%%$'\n'*}
# Jobs that share a machine have different numbers, and so different ports.
export MAIN_PROCESS_IP MAIN_PROCESS_PORT=$((20000 + SLURM_JOB_ID % 20000))
export NUM_PROCESSES=$((SLURM_JOB_NUM_NODES * SLURM_GPUS_ON_NODE))
# How many seconds the launcher waits for its processes after it has passed the signal on to them.
export PET_SHUTDOWN_TIMEOUT=90

stop() {
    # `srun` passes the signal on to the launcher of each machine, and ends when all of them have ended.
    kill -TERM "$steps"
    wait "$steps" || true
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap stop TERM

# Each machine starts the launcher once. Its number is known only there, hence the single quotes. If the launcher of one
# machine fails, `srun` ends all of them.
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch --config_file "$CONFIG_FILE" \
    --num_machines "$SLURM_JOB_NUM_NODES" --num_processes "$NUM_PROCESSES" --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$MAIN_PROCESS_IP" --main_process_port "$MAIN_PROCESS_PORT" run_segmentation.py "$@"' \
    launch "$@" &
steps=$!
# The script waits here, and not for a command in the foreground, because bash runs a trap only between two commands.
wait "$steps"
