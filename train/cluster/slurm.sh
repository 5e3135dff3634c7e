#!/usr/bin/env bash
# A run on the machines of a Slurm job: Ray on all of them, then `atommem train cluster`, with the words given to this script.
#
#   sbatch --nodes=2 --gpus-per-node=8 slurm.sh qwen3-8b-2-nodes --out /shared/runs/qwen3
#
# Submit it from the virtual environment that atommem[cluster] is installed in. That folder, ATOMMEM_DATA and --out must be on a
# file system that all machines share, and so must the folder that modules of your own are in: the one that you submit from, or
# the one that ATOMMEM_MODULES names. Copy this file to change what Slurm is asked for; the variables below can be set outside.
#SBATCH --job-name=atommem
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --signal=B:TERM@120
#SBATCH --output=%x-%j.log
set -euo pipefail

GCS_PORT=${GCS_PORT:-6379}              # Ray's own, on the first machine
DASHBOARD_PORT=${DASHBOARD_PORT:-8265}  # where jobs are submitted, on the first machine
PATIENCE=${PATIENCE:-300}               # seconds until all machines must have joined

[ $# -ge 1 ] || { echo "Give a RECIPE: sbatch … slurm.sh RECIPE [options]" >&2; exit 2; }
nodes=${SLURM_JOB_NUM_NODES:?start this by sbatch}
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
HEAD_IP=${HEAD_IP:-$(hostname --ip-address | awk '{print $1}')}  # this script runs on the first machine
dashboard="http://$HEAD_IP:$DASHBOARD_PORT"
unset RAY_ADDRESS RAY_API_SERVER_ADDRESS # Ray would prefer them to the addresses given here

started=()
on() { # HOST COMMAND…: in the background, until the job ends
    srun --overlap --nodes=1 --ntasks=1 --nodelist="$1" "${@:2}" &
    started+=($!)
}
on "${hosts[0]}" ray start --head --block --node-ip-address="$HEAD_IP" --port="$GCS_PORT" \
    --dashboard-host="$HEAD_IP" --dashboard-port="$DASHBOARD_PORT" --disable-usage-stats
for host in "${hosts[@]:1}"; do
    on "$host" ray start --block --address="$HEAD_IP:$GCS_PORT" --disable-usage-stats
done

alive() { ray list nodes --address="$dashboard" --filter=state=ALIVE --format=json 2>/dev/null | grep -c '"node_id"'; }
until [ "$(alive)" = "$nodes" ]; do
    for pid in "${started[@]}"; do
        kill -0 "$pid" || { echo "Ray did not start on one of the machines; see above." >&2; exit 1; }
    done
    [ "$SECONDS" -lt "$PATIENCE" ] || { echo "Only $(alive) of $nodes machines have joined Ray." >&2; exit 1; }
    sleep 2
done

atommem train cluster "$1" --ray-address "$dashboard" "${@:2}" &
launcher=$!
trap 'kill -TERM "$launcher"' TERM # bash passes on no signal by itself; the launcher stops its job in order
code=0
while kill -0 "$launcher" 2>/dev/null; do
    wait "$launcher" && code=0 || code=$?
done
kill "${started[@]}" 2>/dev/null || true
exit "$code"
