#!/bin/sh
# Locks what the images install: hashes, but no download addresses, so that anybody's package index serves.
# usage: requirements/lock.sh [UV]     (`make lock` calls it)
set -eu
cd "$(dirname "$0")"
uv=${1:-uv}
compile() { "$uv" pip compile -q --generate-hashes --no-header --no-annotate --no-emit-index-url --python-version 3.11 "$@"; }

# torch's CUDA build with its CUDA libraries, apart: the CPU build takes the place of all of it (torch.txt).
compile torch.txt -o torch-cuda.txt
cuda=$(grep -oE '^(torch|triton|cuda-[a-z-]+|nvidia-[a-z0-9-]+)==' torch-cuda.txt | tr -d '=')
skip=$(printf -- '--no-emit-package %s ' $cuda)
others=$(grep -oE '^[a-z0-9-]+==' torch-cuda.txt | tr -d '=' | grep -vxF "$cuda")
compile torch.txt $(printf -- '--no-emit-package %s ' $others) -o torch-cuda.txt

# For people and CI: everything but torch and its CUDA libraries.
compile dev.in -c torch.txt $skip -o dev.txt

# The same versions as in dev.txt, so that what is tested is what ships.
for image in worker trainer predictor; do
  compile $image.in -c torch.txt -c dev.txt $skip -o $image.txt
done
compile build.in -o build.txt
compile node.in -c dev.txt -o node.txt
