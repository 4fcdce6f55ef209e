"""The schemas of Kubernetes' API and of the Prometheus operator's, for kubeconform.

They are made from what the projects publish as Go modules, so nothing of them lies here:

    go mod download k8s.io/kubernetes@v1.37.2
    go mod download github.com/prometheus-operator/prometheus-operator@v0.85.0
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

API = "k8s.io/kubernetes@v1.37.2"
OPERATOR = "github.com/prometheus-operator/prometheus-operator@v0.85.0"
_SWAGGER = "api/openapi-spec/swagger.json"
_CRDS = "jsonnet/prometheus-operator"
#: By kind, in lower case, the name of its schema in the API.
KINDS = {
    "deployment": "io.k8s.api.apps.v1.Deployment",
    "statefulset": "io.k8s.api.apps.v1.StatefulSet",
    "daemonset": "io.k8s.api.apps.v1.DaemonSet",
    "cronjob": "io.k8s.api.batch.v1.CronJob",
    "networkpolicy": "io.k8s.api.networking.v1.NetworkPolicy",
    "persistentvolumeclaim": "io.k8s.api.core.v1.PersistentVolumeClaim",
    "service": "io.k8s.api.core.v1.Service",
}
_CUSTOM = ("podmonitors", "prometheusrules")
_PREFIX = "#/definitions/"
_DRAFT = "http://json-schema.org/draft-04/schema#"


def module(version: str) -> Path:
    """The folder of a Go module that is downloaded already. Raises LookupError."""
    told = subprocess.run(["go", "env", "GOMODCACHE"], capture_output=True, text=True, check=True)
    folder = Path(told.stdout.strip(), version)
    if not folder.is_dir():
        raise LookupError(f"needs a Go module: go mod download {version}")
    return folder


def write_schemas(folder: Path) -> None:
    """Write a schema for each kind, as `<kind>.json`. Raises LookupError."""
    known = json.loads((module(API) / _SWAGGER).read_bytes())["definitions"]
    for kind, name in KINDS.items():
        needed = {each: strict(known[each]) for each in _reached(name, known)}
        document = {"$schema": _DRAFT, "$ref": f"{_PREFIX}{name}", "definitions": needed}
        (folder / f"{kind}.json").write_text(json.dumps(document))
    for plural in _CUSTOM:
        crd = json.loads((module(OPERATOR) / _CRDS / f"{plural}-crd.json").read_bytes())
        (schema,) = (each["schema"]["openAPIV3Schema"] for each in crd["spec"]["versions"])
        # The file has nothing of an object's name, labels and so on.
        schema["properties"]["metadata"] = {"type": "object"}
        document = {"$schema": _DRAFT, **strict(schema)}
        (folder / f"{plural.removesuffix('s')}.json").write_text(json.dumps(document))


def _reached(name: str, known: dict[str, Any]) -> set[str]:
    """The definitions that one needs, itself included."""
    found: set[str] = set()
    left = [name]
    while left:
        each = left.pop()
        if each not in found:
            found.add(each)
            left += _references(known[each])
    return found


def _references(schema: object) -> list[str]:
    return re.findall(rf'"\$ref": "{_PREFIX}([^"]+)"', json.dumps(schema))


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """The same as JSON Schema, with no property allowed that is not in it."""
    if schema.get("x-kubernetes-int-or-string") or schema.get("format") == "int-or-string":
        return {"type": ["integer", "string"]}
    made = {key: value for key, value in schema.items() if key != "format"}
    for key in ("items", "additionalProperties"):
        if isinstance(made.get(key), dict):
            made[key] = strict(made[key])
    if "properties" in schema:
        made["properties"] = {key: strict(each) for key, each in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            made.setdefault("additionalProperties", False)
    return made
