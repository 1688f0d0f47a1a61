#!/usr/bin/env bash
# The proof of tests/cluster on a cluster made for it: builds the images, boots a Kubernetes and an S3 server, runs the
# tests, and takes away what it started, however it ends. What ran before is used and left running.
# usage: tests/cluster/rig.sh RIG [pytest arguments]
#   RIG      a folder with the commands tools, images, cluster and s3 (one node on this machine; root)
#   PYTHON   the interpreter with the tests' packages (.venv/bin/python)
# Logs of every step: build/rig/*.log.
set -euo pipefail
if [ $# -lt 1 ] || [ ! -x "$1/cluster" ]; then
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0" >&2
  exit 2
fi
RIG=$(cd "$1" && pwd)
shift
cd "$(dirname "$0")/../.."
LOGS=$PWD/build/rig
PYTHON=${PYTHON:-$PWD/.venv/bin/python}
VERSION=$(sed -n 's/^appVersion: *//p' charts/feyntune/Chart.yaml)
SEAWEEDFS=$(sed -n 's/^ *image: docker.io\/chrislusf\/seaweedfs://p' charts/feyntune/values.yaml)
SLIM=docker.io/library/python:3.11-slim-bookworm
export RIG_TMPFS=${RIG_TMPFS:-14g} # room for three images with torch in two of them
started=() compiling='' t_all=$SECONDS
rm -rf "$LOGS"
mkdir -p "$LOGS"

say() { printf 'rig.sh %s  %s\n' "$(date +%T)" "$*"; }

# step NAME ATTEMPTS COMMAND...: output goes to a log, whose end is shown when the last attempt has failed too.
step() {
  local name=$1 attempts=$2 log=$LOGS/$1.log t0=$SECONDS i
  shift 2
  for ((i = 1; i <= attempts; i++)); do
    if "$@" >>"$log" 2>&1 </dev/null; then
      say "$name: $((SECONDS - t0)) s"
      return
    fi
    say "$name: attempt $i of $attempts failed"
    [ "$i" = "$attempts" ] || sleep $((i * 15))
  done
  say "$name failed; the end of $log:"
  tail -n 60 "$log"
  return 1
}

clean() {
  local rc=$? i log
  trap '' INT TERM
  trap - EXIT
  [ -z "$compiling" ] || kill -- "-$compiling" 2>/dev/null || true
  if [ $rc != 0 ]; then
    for log in "${RIG_RUN:-/var/tmp/rig}"/cluster/log/{apiserver,kubelet,containerd}.log; do
      [ ! -f "$log" ] || { say "the end of $log:" && tail -n 20 "$log"; }
    done
  fi
  for ((i = ${#started[@]} - 1; i >= 0; i--)); do
    "$RIG/${started[i]}" down >>"$LOGS/down.log" 2>&1 || say "${started[i]} down failed, see $LOGS/down.log"
  done
  say "exit status $rc after $((SECONDS - t_all)) s"
  exit $rc
}
trap clean EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

use() { # what a part tells of itself; with `eval "$(…)"` alone a failure would pass for nothing to say
  local told
  told=$("$RIG/$1" env) && eval "$told"
}
runs() { (use "$1" && eval "$2") >/dev/null 2>&1; }

image() { # NAME ARGUMENTS...
  local name=$1
  shift
  # node has certificates of its own and is told of the machine's
  "$RIG/images" build -t "docker.io/feyntune/$name:$VERSION" --build-arg VERSION="$VERSION" \
    --env NODE_EXTRA_CA_CERTS=/etc/ssl/certs/ca-certificates.crt \
    --build-arg REVISION="$(git rev-parse HEAD 2>/dev/null || echo unknown)" "$@" -f "images/$name/Dockerfile" .
}

# Kubernetes is compiled where its binaries are not in the cache yet; the images are built meanwhile.
set -m
"$RIG/cluster" build >"$LOGS/compile.log" 2>&1 </dev/null &
compiling=$!
set +m
step tools 4 "$RIG/tools"
eval "$("$RIG/tools" 2>/dev/null)"
step base 3 "$RIG/images" base
step worker 3 image worker
step predictor 3 image predictor
step trainer 3 image trainer --build-arg TORCH=cpu --build-arg CUDA=$SLIM
step seaweedfs 3 "$RIG/images" build -t "docker.io/chrislusf/seaweedfs:$SEAWEEDFS" \
  --build-arg VERSION="$SEAWEEDFS" -f tests/cluster/seaweedfs.Dockerfile tests/cluster
t0=$SECONDS
wait "$compiling" || say "compiling Kubernetes failed and is tried again: $(tail -n 3 "$LOGS/compile.log")"
compiling=''
say "compile: $((SECONDS - t0)) s more"

if runs cluster 'kubectl get --raw /readyz'; then
  say "uses the cluster that is up"
else
  started+=(cluster)
  step cluster-up 3 "$RIG/cluster" up
fi
use cluster
step gpu 3 "$RIG/cluster" gpu 3
kubectl taint node "$RIG_NODE" nvidia.com/gpu- >/dev/null # the tests taint it while a run needs that
runs s3 'curl -sf -m 5 -o /dev/null "$S3_ENDPOINT"' || started+=(s3)
step s3-up 5 "$RIG/s3" up --bind "$RIG_POD_HOST"
use s3
step load 2 "$RIG/images" load docker.io/feyntune/{worker,predictor,trainer}:"$VERSION" \
  "docker.io/chrislusf/seaweedfs:$SEAWEEDFS"

say "runs the tests"
PYTHONPATH=$PWD OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false FEYNTUNE_POD_HOST=$RIG_POD_HOST \
  "$PYTHON" -m pytest -m cluster tests/cluster --durations=0 "$@"
