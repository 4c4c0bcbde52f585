#!/usr/bin/env bash
# Tell Ray that the node this runs on is about to be taken away: runs on it keep a checkpoint of their step and go on elsewhere.
#
#   drain.sh SECONDS [NODE_ID]         announce it, and wait until no train worker is left, SECONDS at most
#   drain.sh --watch aws|gcp           on a spot machine: wait for the cloud's notice, then do so
#
# The first is the preStop hook of a worker's pod. NODE_ID is the Ray node in this container where it is not given.
set -euo pipefail

wait_for_notice() { # AWS tells two minutes before, GCP thirty seconds. -> the seconds that are left to use
    local token instance=http://169.254.169.254
    case "$1" in
    aws)
        until token="$(wget -qO- --method=PUT --header='X-aws-ec2-metadata-token-ttl-seconds: 60' $instance/latest/api/token)" &&
            wget -qO- --header="X-aws-ec2-metadata-token: $token" $instance/latest/meta-data/spot/instance-action >&2; do
            sleep 5
        done
        echo 100
        ;;
    gcp)
        until [[ "$(wget -qO- --header='Metadata-Flavor: Google' $instance/computeMetadata/v1/instance/preempted)" == TRUE ]]; do
            sleep 1
        done
        echo 25
        ;;
    *) echo "error: expected aws or gcp, got $1" >&2 && exit 2 ;;
    esac
}

node_here() { # Ray's processes name their node
    local id
    id="$(cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\0' '\n' | sed -n 's/^--node[-_]id=\([0-9a-f]\{56\}\)$/\1/p' | sort -u || true)"
    [[ "$id" =~ ^[0-9a-f]{56}$ ]] || { echo "error: found not one Ray node here but: ${id:-none}" >&2 && return 1; }
    echo "$id"
}

train_workers() { # of any run, on this node
    pgrep -f '^ray::.*TrainWorker' >/dev/null
}

[[ $# -gt 0 ]] || { sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 2; }
if [[ "$1" == --watch ]]; then
    seconds="$(wait_for_notice "${2:?aws or gcp}")" && shift
else
    seconds="$1"
fi
node="${2:-}"
[[ "$node" =~ ^[0-9a-f]{56}$ ]] || node="$(node_here)"
ray drain-node --address "${RAY_ADDRESS:-auto}" --node-id "$node" --reason DRAIN_NODE_REASON_PREEMPTION \
    --reason-message "the machine is about to be taken away" --deadline-remaining-seconds "$seconds"
end=$((SECONDS + seconds))
while train_workers && [[ $SECONDS -lt $end ]]; do
    sleep 0.5
done
