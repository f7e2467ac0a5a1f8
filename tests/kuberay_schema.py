"""What KubeRay's RayCluster and RayJob (ray.io/v1) and Kubernetes' pods take, as a JSON schema: the fields we use.

Source: KubeRay's API types, ray-operator/apis/ray/v1/raycluster_types.go and rayjob_types.go (read, not copied): names,
types, what is required, and the enumerations. Unknown fields are refused on every level that is ours to fill.
"""

from __future__ import annotations

from typing import Any

STRING, BOOLEAN = {"type": "string"}, {"type": "boolean"}
INTEGER = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
TEXTS = {"type": "object", "additionalProperties": STRING}
QUANTITY = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"}
QUANTITIES = {"type": "object", "additionalProperties": QUANTITY}
NAME = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}


def fields(required: tuple[str, ...] = (), **known: Any) -> dict[str, Any]:
    """An object with these fields and no others."""
    return {"type": "object", "properties": known, "required": list(required), "additionalProperties": False}


def each(item: dict[str, Any], at_least: int = 0) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": at_least}


def one_of(*values: str) -> dict[str, Any]:
    return {"enum": list(values)}


CONTAINER = fields(
    ("name", "image"),
    name=NAME,
    image=STRING,
    ports=each(fields(("containerPort",), containerPort={**INTEGER, "maximum": 65535}, name={**NAME, "maxLength": 15})),
    env=each(fields(("name",), name=STRING, value=STRING)),
    envFrom=each(fields(secretRef=fields(("name",), name=NAME), configMapRef=fields(("name",), name=NAME))),
    resources=fields(limits=QUANTITIES, requests=QUANTITIES),
    volumeMounts=each(fields(("name", "mountPath"), name=NAME, mountPath=STRING, readOnly=BOOLEAN)),
)
POD = fields(
    ("spec",),
    metadata=fields(annotations=TEXTS, labels=TEXTS),
    spec=fields(
        ("containers",),
        containers=each(CONTAINER, 1),
        nodeSelector=TEXTS,
        terminationGracePeriodSeconds=INTEGER,
        tolerations=each(
            fields(
                key=STRING,
                operator=one_of("Exists", "Equal"),
                value=STRING,
                effect=one_of("NoSchedule", "PreferNoSchedule", "NoExecute"),
            )
        ),
        volumes=each(fields(("name",), name=NAME, emptyDir=fields(medium=one_of("", "Memory"), sizeLimit=QUANTITY))),
    ),
)
HEAD_GROUP = fields(
    ("rayStartParams", "template"),
    serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer"),
    enableIngress=BOOLEAN,
    rayStartParams=TEXTS,
    template=POD,
)
WORKER_GROUP = fields(
    ("groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"),
    groupName=NAME,
    replicas=INTEGER,
    minReplicas=INTEGER,
    maxReplicas=INTEGER,
    numOfHosts=INTEGER,
    rayStartParams=TEXTS,
    template=POD,
)
CLUSTER_SPEC = fields(
    ("headGroupSpec",),
    headGroupSpec=HEAD_GROUP,
    workerGroupSpecs=each(WORKER_GROUP),
    rayVersion=STRING,
    enableInTreeAutoscaling=BOOLEAN,
    autoscalerOptions=fields(
        idleTimeoutSeconds=INTEGER, upscalingMode=one_of("Default", "Aggressive", "Conservative"), image=STRING
    ),
    headServiceAnnotations=TEXTS,
    suspend=BOOLEAN,
)
JOB_SPEC = fields(
    ("entrypoint", "rayClusterSpec"),
    entrypoint=STRING,
    rayClusterSpec=CLUSTER_SPEC,
    submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode"),
    shutdownAfterJobFinishes=BOOLEAN,
    ttlSecondsAfterFinished=INTEGER,
    activeDeadlineSeconds=INTEGER,
    backoffLimit=INTEGER,
    metadata=TEXTS,
    runtimeEnvYAML=STRING,
    entrypointNumCpus={"type": "number", "minimum": 0},
    entrypointNumGpus={"type": "number", "minimum": 0},
    suspend=BOOLEAN,
)


def manifest(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    """The schema of one document."""
    meta = fields(("name",), name=NAME, namespace=NAME, labels=TEXTS, annotations=TEXTS)
    head = {"apiVersion": {"const": "ray.io/v1"}, "kind": {"const": kind}}
    return fields(("apiVersion", "kind", "metadata", "spec"), **head, metadata=meta, spec=spec)


SCHEMAS = {"RayCluster": manifest("RayCluster", CLUSTER_SPEC), "RayJob": manifest("RayJob", JOB_SPEC)}
