#!/bin/sh
# Copies the images of images.txt into your registry, digests unchanged. Needs skopeo.
# usage: mirror.sh PREFIX       such as registry.example/team; then install with --set images.prefix=PREFIX
set -eu
prefix=${1:?usage: mirror.sh PREFIX, such as registry.example/team}
command -v skopeo >/dev/null || { echo "skopeo is needed: install it with your package manager" >&2; exit 1; }
grep -v '^#' "$(dirname "$0")/images.txt" | while read -r image; do
  name=${image##*/}
  case $image in
    feyntune/*) from=containers-storage:localhost/$image; skopeo inspect "$from" >/dev/null 2>&1 || from=docker-daemon:$image ;;
    *) from=docker://$image ;;
  esac
  echo "$image -> $prefix/$name"
  skopeo copy --all --preserve-digests "$from" "docker://$prefix/$name"
done
echo "Set in your values: images.prefix=$prefix, objectStore.seaweedfs.image=$prefix/seaweedfs:TAG, pushgateway.image=$prefix/pushgateway:TAG"
