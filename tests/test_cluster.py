"""The cluster file against Ray's own schema."""

from pathlib import Path

import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

CLUSTER = Path(__file__).parents[1] / "ray_cluster.yaml"


def test_cluster_file_passes_rays_validation():
    config = prepare_config(yaml.safe_load(CLUSTER.read_text()))
    config.setdefault("cluster_synced_files", [])
    validate_config(config)
    kinds = config["available_node_types"]
    assert set(kinds) == {"head", "cpu_worker", "gpu_worker"}
    assert kinds["head"]["max_workers"] == 0 and kinds["head"]["resources"]["CPU"] == 0
