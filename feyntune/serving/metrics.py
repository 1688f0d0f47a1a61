"""What the endpoint tells Prometheus. Labels hold names of served adapters only, never what a client sent."""

from prometheus_client import Counter, Gauge, Histogram

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

REQUESTS = Counter("feyntune_requests", "Requests answered.", ["adapter", "protocol", "outcome"])
TOKENS = Counter("feyntune_tokens", "Tokens read (prompt) and made (completion).", ["adapter", "kind"])
FIRST_TOKEN = Histogram(
    "feyntune_time_to_first_token_seconds", "From submission, queueing included.", ["adapter"], buckets=_SECONDS
)
PER_TOKEN = Histogram(
    "feyntune_time_per_token_seconds",
    "Mean time between the tokens of a completion.",
    ["adapter"],
    buckets=(0.001, 0.0025, *_SECONDS[:9]),
)
BATCH = Histogram("feyntune_batch_requests", "Requests in a step.", buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256))
RUNNING = Gauge("feyntune_running_requests", "Requests in the batch now.")
WAITING = Gauge("feyntune_waiting_requests", "Requests in the queue now.")
SERVED = Gauge("feyntune_adapter_served", "1 for each name and the version it means.", ["name", "version"])
LOADS = Counter("feyntune_adapter_loads", "Attempts to load an adapter.", ["adapter", "outcome"])
LOAD_SECONDS = Histogram("feyntune_adapter_load_seconds", "Fetching, checking and loading.", buckets=_SECONDS)
REFUSED = Gauge("feyntune_adapter_refused", "1 for each registered adapter that cannot be served.", ["version"])
MISSING = Gauge("feyntune_name_missing", "1 for each registered name that no version answers.", ["name"])
REGISTRY_ERRORS = Counter("feyntune_registry_errors", "Times the registry could not be read.")
REGISTRY_READ = Gauge("feyntune_registry_read_timestamp_seconds", "When the registry was last read.")
CANARY = Counter("feyntune_canary_requests", "Requests for the champion while a canary runs.", ["arm", "outcome"])
CANARY_SHARE = Gauge("feyntune_canary_share", "Share of the champion's requests the canary gets now.")
CANARY_BACKED_OFF = Gauge("feyntune_canary_backed_off", "1 for the canary that lost its share.", ["version"])
