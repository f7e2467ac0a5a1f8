"""The cluster files against Ray's own schema and KubeRay's fields, and what they must say to be of use."""

from __future__ import annotations

import copy
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from kinema.configs import load_stage
from tests.kuberay_schema import SCHEMAS

ROOT = Path(__file__).parents[1]


def manifests() -> dict[str, Any]:
    return {one["kind"]: one for one in yaml.safe_load_all((ROOT / "kuberay.yaml").read_text())}


def test_cluster_file_passes_rays_validation():
    config = prepare_config(yaml.safe_load((ROOT / "ray_cluster.yaml").read_text()))
    config.setdefault("cluster_synced_files", [])
    validate_config(config)
    kinds = config["available_node_types"]
    assert set(kinds) == {"head", "cpu_worker", "gpu_worker"}
    assert kinds["head"]["max_workers"] == 0 and kinds["head"]["resources"]["CPU"] == 0
    workers = [kinds["cpu_worker"], kinds["gpu_worker"]]
    assert all(kind["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot" for kind in workers)
    assert all(1 == kind["min_workers"] < kind["max_workers"] for kind in workers), "they grow from one"
    assert kinds["gpu_worker"]["resources"]["GPU"] == 1


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_kuberay_manifest_has_the_fields_of_the_resource(kind):
    jsonschema.validate(manifests()[kind], SCHEMAS[kind])


def test_wrong_manifests_are_seen():
    good = manifests()["RayJob"]
    for path, value in {
        ("spec", "entrypont"): "x",
        ("spec", "rayClusterSpec", "workerGroupSpecs", 0, "minReplicas"): "1",
        ("spec", "rayClusterSpec", "autoscalerOptions", "upscalingMode"): "Fast",
        ("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"): 0,
    }.items():
        bad: Any = copy.deepcopy(good)
        place = bad
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, SCHEMAS["RayJob"])


def test_kuberay_clusters_scale_run_on_spot_machines_and_keep_the_head_free():
    found = manifests()
    job = found["RayJob"]["spec"]
    for spec in (found["RayCluster"]["spec"], job["rayClusterSpec"]):
        assert spec["enableInTreeAutoscaling"] and spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        assert spec["rayVersion"] == ray.__version__
        assert "nodeSelector" not in spec["headGroupSpec"]["template"]["spec"], "the head is not on a spot machine"
        for group in spec["workerGroupSpecs"]:
            assert 1 <= group["minReplicas"] < group["maxReplicas"]
            assert "spot" in group["template"]["spec"]["nodeSelector"].values()
    groups = {group["groupName"]: group for group in found["RayCluster"]["spec"]["workerGroupSpecs"]}
    limits = groups["gpu"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert set(groups) == {"cpu", "gpu"} and limits["nvidia.com/gpu"] == "1"
    program, stage, *arguments = shlex.split(job["entrypoint"])
    assert program == "kinema"
    config: Any = load_stage(stage, None, [text for text in arguments if text != "--json"], away=True)
    assert config.out == job["metadata"]["out"]


def test_no_credentials_in_the_files():
    for name in ("kuberay.yaml", "ray_cluster.yaml"):
        text = (ROOT / name).read_text()
        assert "SECRET" not in text.replace("secretRef", "").upper() and "AKIA" not in text
