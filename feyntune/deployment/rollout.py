"""Whether a Deployment's pods are the ones asked for, all of them; and why they are not yet.

`Ready` of an InferenceService does not say this: it stays True while the old pods answer and new ones cannot start,
and its observedGeneration is the Deployment's counter, not its own (KServe 0.20, issues 4626 and 6081).
"""

from typing import Any

Object = dict[str, Any]


def unfinished(deployment: Object | None, container: Object, replicas: int) -> str | None:
    """Why `deployment` does not run `replicas` pods of `container` and no others; None when it does.

    Args:
        deployment: as the API server answers it (camelCase keys); None where it does not exist.
        container: name, and of image, args and resources those that were asked for.
    """
    if deployment is None:
        return "its Deployment does not exist yet"
    metadata, spec, status = deployment["metadata"], deployment["spec"], deployment.get("status") or {}
    containers = {c["name"]: c for c in spec["template"]["spec"]["containers"]}
    actual = containers.get(container["name"], {})
    for field in ("image", "args", "resources"):
        if field in container and actual.get(field) != container[field]:
            return f"its Deployment does not have the {field} asked for yet"
    if status.get("observedGeneration", 0) < metadata.get("generation", 0):
        return "its Deployment's change is not taken up yet"
    counts = {field: status.get(field, 0) for field in ("replicas", "updatedReplicas", "availableReplicas")}
    if spec.get("replicas", 1) != replicas or set(counts.values()) != {replicas}:
        new, old = counts["updatedReplicas"], counts["replicas"] - counts["updatedReplicas"]
        return f"{new} of {replicas} new pods made, {counts['availableReplicas']} available, {old} old" + conditions(
            status
        )
    return None


def conditions(status: Object, *ignored: str) -> str:
    """The messages of a status' conditions that are not met, as the end of a sentence; "" for none."""
    unmet = [
        c.get("message") or c.get("reason", "")
        for c in status.get("conditions", [])
        if c.get("status") != "True" and c.get("type") not in ignored
    ]
    return "".join(f"; {message.rstrip('.')}" for message in dict.fromkeys(unmet) if message)
