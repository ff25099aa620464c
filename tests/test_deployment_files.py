"""Files for clusters, checked against the schemas of the tools that read them."""

import json
from pathlib import Path

import jsonschema
import ray
import yaml

ROOT = Path(__file__).parents[1]


def test_cluster_file_is_valid_for_the_ray_cluster_launcher() -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
    config = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())

    jsonschema.validate(config, schema)

    assert config["head_node_type"] in config["available_node_types"]
