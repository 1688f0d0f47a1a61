"""Names that the pipelines, the components, the deployment and the chart share, each in one place."""

from importlib import metadata

VERSION = metadata.version("feyntune")

IMAGE_USER = 65532  # numeric user and group of the images; restricted namespaces refuse root
WORKER_IMAGE = f"feyntune/worker:{VERSION}"  # CPU steps
TRAINER_IMAGE = f"feyntune/trainer:{VERSION}"  # training and scoring
PREDICTOR_IMAGE = f"feyntune/predictor:{VERSION}"  # the endpoint

S3_SECRET = "feyntune-s3"  # S3_ENDPOINT, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_DEFAULT_REGION
HUB_SECRET = "feyntune-hub"  # HF_TOKEN

CA_FOLDER = "/etc/feyntune-ca"  # where pods have a ConfigMap's ca.crt

# Headers of the endpoint's answers: the registered version that gave it, and the software's.
VERSION_HEADER = "x-feyntune-version"
RELEASE_HEADER = "x-feyntune-release"

DEFAULT_BASE = "meta-llama/Llama-3.1-8B"
DEFAULT_SOURCE = "oai:https://oaipmh.arxiv.org/oai"
DEFAULT_STORE = "s3://feyntune"
DEFAULT_REGISTRY = "s3://feyntune/registry"

# What a pod asks for with each GPU: cores, GiB.
CPUS_PER_GPU, MEMORY_PER_GPU, MEMORY_LIMIT_PER_GPU = 6, 24, 64

# Retries that a pipeline asks the cluster for; the last attempt reports a fault instead of asking for another.
TRAIN_RETRIES, EVALUATE_RETRIES = 5, 2
