#!/usr/bin/env bash
# Send a job to a Ray cluster and follow its log, or look after one that was sent.
#
#   cluster/scripts/submit.sh [--id ID] [--runtime-env FILE] [--no-wait] JOB [options of jobs/JOB.py]
#   cluster/scripts/submit.sh list | status ID | logs ID | stop ID
#
# RAY_ADDRESS is the cluster's dashboard (http://127.0.0.1:8265); the token is found where Ray looks for it.
# A command has one submission id, made of the job and its --name (else of a digest of its options) and a number. While it
# runs, the same command follows it; when it has ended, the same command sends it again under the next number.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
export PATH="$root/.venv/bin:$PATH"
export RAY_ADDRESS="${RAY_ADDRESS:-http://127.0.0.1:8265}" RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}"
export PYTHONUNBUFFERED=1 # a log that is piped comes line by line
export RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES="" # .rayignore says it; Ray's own list comes with a warning

fail() {
    echo "error: $1" >&2
    exit 2
}

usage() {
    sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    exit "$1"
}

ray_job() { # Ray colours its lines in files too
    local command="$1" colour=auto
    shift
    [[ -t 1 ]] || colour=false
    exec ray job "$command" --log-color "$colour" "$@"
}

id="" runtime_env="$root/cluster/runtime_env/default.yaml" wait=()
while [[ $# -gt 0 ]]; do
    case "$1" in
    --id) id="${2:?--id needs a value}" && shift 2 ;;
    --runtime-env) runtime_env="${2:?--runtime-env needs a value}" && shift 2 ;;
    --no-wait) wait=(--no-wait) && shift ;;
    -h | --help) usage 0 ;;
    list) ray_job list ;;
    status | stop) ray_job "$1" "${2:?which id? see: submit.sh list}" ;;
    logs) ray_job logs --follow "${2:?which id? see: submit.sh list}" ;;
    *) break ;;
    esac
done
[[ $# -gt 0 ]] || usage 2
job="$1" && shift
[[ -f "$root/jobs/$job.py" ]] || fail "there is no jobs/$job.py"
[[ -r "$runtime_env" ]] || fail "cannot read $runtime_env"
runtime_env="$(cd "$(dirname "$runtime_env")" && pwd)/$(basename "$runtime_env")"
PYTHONPATH="$root" python "$root/cluster/scripts/refuse_secrets.py" "$runtime_env" "$@"

if [[ -z "$id" ]]; then
    id="$job-$(printf '%s\0' "$@" | cksum | cut -d' ' -f1)"
    previous=""
    for argument in "$@"; do
        [[ "$previous" != "--name" ]] || id="$job-$argument"
        [[ "$argument" != --name=* ]] || id="$job-${argument#--name=}"
        previous="$argument"
    done
fi

jobs="$(ray job list --log-color false)"
number="$(grep -oE "submission_id='${id//./\\.}-[0-9]+'" <<<"$jobs" | grep -oE "[0-9]+'" | tr -d "'" | sort -n | tail -n 1 || true)"
if [[ -n "$number" ]]; then
    state="$(ray job status --log-color false "$id-$number" 2>&1)"
    if grep -qE "': (PENDING|RUNNING)" <<<"$state"; then
        echo "$id-$number runs already; cluster/scripts/submit.sh stop $id-$number ends it"
        [[ ${#wait[@]} -eq 0 ]] || exit 0
        ray_job logs --follow "$id-$number"
    fi
fi

cd "$root"
ray_job submit --submission-id "$id-$((${number:-0} + 1))" --runtime-env "$runtime_env" --working-dir . \
    ${wait[@]+"${wait[@]}"} -- python "jobs/$job.py" "$@"
