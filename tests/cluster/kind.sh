#!/usr/bin/env bash
# The proof of tests/cluster on a kind cluster with real Kubeflow Pipelines and KServe, installed from
# manifests/prerequisites. Uses the cluster of that name, or creates it; leaves it running.
# usage: tests/cluster/kind.sh [CLUSTER] [IMAGE PREFIX] [VERSION]     (`make test-kind` calls it)
# Needs docker, kind, kubectl, helm, the images of `make images`, and cert-manager in the cluster. Not run yet.
set -euo pipefail
cd "$(dirname "$0")/../.."
cluster=${1:-feyntune}
prefix=${2:-feyntune}
version=${3:-$(sed -n 's/^appVersion: *"\{0,1\}\([^"]*\)"\{0,1\}$/\1/p' charts/feyntune/Chart.yaml)}
for tool in docker kind kubectl helm; do
  command -v "$tool" >/dev/null || { echo "kind.sh needs $tool: install it" >&2; exit 1; }
done

kind get clusters | grep -qx "$cluster" || kind create cluster --name "$cluster" --wait 2m
KUBECONFIG=$(mktemp)
export KUBECONFIG
kind get kubeconfig --name "$cluster" >"$KUBECONFIG"
for image in worker trainer predictor; do
  kind load docker-image --name "$cluster" "$prefix/$image:$version"
done

# The order and the waits of manifests/prerequisites/README.md. cert-manager is the cluster's own business there.
P=manifests/prerequisites
apply() { kubectl apply --server-side -k "$P/$1"; }
apply pipelines/crds
kubectl wait crd/applications.app.k8s.io --for=condition=Established --timeout=60s
apply pipelines
kubectl -n kubeflow rollout status deployment/ml-pipeline --timeout=10m
kubectl -n cert-manager rollout status deployment/cert-manager-webhook --timeout=5m
apply kserve || true # the CRDs first; the webhook is not up yet
kubectl wait crd/inferenceservices.serving.kserve.io --for=condition=Established --timeout=60s
kubectl -n kserve rollout status deployment/kserve-controller-manager --timeout=5m
apply kserve

# An S3 server that pods and this machine both reach: SeaweedFS as a container on kind's network.
AWS_ACCESS_KEY_ID=feyntune
AWS_SECRET_ACCESS_KEY=$(openssl rand -hex 16)
export AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY
docker rm -f "$cluster-s3" >/dev/null 2>&1 || true
docker run -d --name "$cluster-s3" --network kind -e AWS_ACCESS_KEY_ID -e AWS_SECRET_ACCESS_KEY \
  "$(sed -n 's/^ *image: \(docker.io\/chrislusf\/seaweedfs:.*\)$/\1/p' charts/feyntune/values.yaml)" server -s3 >/dev/null
address=$(docker inspect -f '{{.NetworkSettings.Networks.kind.IPAddress}}' "$cluster-s3")
export S3_ENDPOINT=http://$address:8333 S3_ENDPOINT_PODS=http://$address:8333

exec make test-cluster
