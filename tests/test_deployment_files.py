"""Files for clusters, checked against the schemas of the tools that read them."""

import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.serve.schema import ServeDeploySchema

from deploy.serving.run import ANSWER_S
from pipeline.cluster import fitting, worker_bundle
from pipeline.recipe import load_recipe

ROOT = Path(__file__).parents[1]


def test_cluster_file_is_valid_for_the_ray_cluster_launcher() -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
    config = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())

    jsonschema.validate(config, schema)

    assert config["head_node_type"] in config["available_node_types"]


def test_no_node_starts_with_an_image_that_cannot_run_braid_or_without_a_token() -> None:
    """Where a node type names no image, Ray's default is one without a Python that fits."""
    config = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    nodes = config["available_node_types"].values()

    assert [node["node_config"]["ImageId"] for node in nodes] == ["FILL-IN"] * 3
    assert "~/.ray/auth_token" in config["file_mounts"].values()
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    starts = [line for line in starts if "ray start" in line]
    assert len(starts) == 2
    assert all(line.startswith("RAY_AUTH_MODE=token ") for line in starts)


def test_shared_storage_has_one_path_and_a_node_without_it_does_not_start() -> None:
    cluster = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    recipe = load_recipe("cluster")

    assert recipe.data.root.is_relative_to("/mnt/braid")
    assert recipe.cluster.autoscale_timeout_s is not None, "the head alone has no CPU"
    (check,) = [line for line in cluster["setup_commands"] if line.startswith("mountpoint")]
    done = subprocess.run(
        ["bash", "-c", check.replace("/mnt/braid", "/nothing/mounted")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "fill in the mount line" in done.stderr


def documents(name: str) -> dict[str, Any]:
    """Objects of a Kubernetes file, by kind."""
    text = (ROOT / "deploy" / "kubernetes" / name).read_text()
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def test_pods_share_image_token_and_storage() -> None:
    cluster = documents("cluster.yaml")
    spec = cluster["RayCluster"]["spec"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    job = documents("nightly.yaml")["CronJob"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    containers = [c for group in groups for c in group["template"]["spec"]["containers"]]

    assert len({c["image"] for c in (*containers, *job["containers"])}) == 1
    # The operator adds the autoscaler's container itself, and nothing of the head's.
    for container in (*containers, *job["containers"], spec["autoscalerOptions"]):
        env = {entry["name"]: entry for entry in container["env"]}
        assert env["RAY_AUTH_MODE"]["value"] == "token"
        assert env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == "braid-token"
    root = load_recipe("cluster").data.root
    for group in groups:
        pod = group["template"]["spec"]
        claims = {v["name"]: v.get("persistentVolumeClaim", {}) for v in pod["volumes"]}
        (mounted,) = [
            claims[mount["name"]]["claimName"]
            for mount in pod["containers"][0]["volumeMounts"]
            if root.is_relative_to(mount["mountPath"]) and mount["mountPath"] != "/"
        ]
        assert mounted == cluster["PersistentVolumeClaim"]["metadata"]["name"]


def test_a_service_on_kubernetes_has_room_and_reads_what_the_cluster_writes() -> None:
    service, cluster = documents("service.yaml")["RayService"]["spec"], documents("cluster.yaml")
    serve = ServeDeploySchema.model_validate(yaml.safe_load(service["serveConfigV2"]))
    spec = service["rayClusterConfig"]
    (application,) = serve.applications
    module, function = application.import_path.split(":")
    build = getattr(importlib.import_module(module), function)
    config = inspect.get_annotations(build)["config"].model_validate(application.args)

    nodes = cluster["RayCluster"]["spec"]
    assert spec["rayVersion"] == nodes["rayVersion"]
    assert spec["authOptions"] == {"mode": "token"}
    head, (workers,) = spec["headGroupSpec"], spec["workerGroupSpecs"]
    for group in (head, workers):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        theirs = nodes["headGroupSpec"]["template"]["spec"]
        assert container["image"] == theirs["containers"][0]["image"]
        assert pod["volumes"] == theirs["volumes"][:1]
        (mount,) = container["volumeMounts"]
        assert config.out.is_relative_to(mount["mountPath"])
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    each = {"CPU": config.cpus_per_replica}
    room = workers["replicas"] * fitting({"CPU": float(limits["cpu"])}, each)
    assert room == config.replicas
    ports = [port["containerPort"] for port in head["template"]["spec"]["containers"][0]["ports"]]
    assert serve.http_options.port in ports
    assert serve.http_options.request_timeout_s == ANSWER_S


def test_the_recipe_of_a_cluster_has_room_on_kubernetes() -> None:
    spec = documents("cluster.yaml")["RayCluster"]["spec"]
    recipe, room = load_recipe("cluster"), 0
    for group in spec["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        node = {"CPU": float(limits["cpu"]), "GPU": float(limits.get("nvidia.com/gpu", 0))}
        room += group["maxReplicas"] * fitting(node, worker_bundle(recipe.cluster))
    assert room == recipe.cluster.num_workers
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    pins = (ROOT / "requirements" / "constraints.txt").read_text().splitlines()
    assert f"ray=={spec['rayVersion']}" in pins


def test_the_nightly_job_submits_to_the_head_of_the_cluster() -> None:
    name = documents("cluster.yaml")["RayCluster"]["metadata"]["name"]
    job = documents("nightly.yaml")["CronJob"]["spec"]
    assert job["concurrencyPolicy"] == "Forbid"
    (container,) = job["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    (script,) = container["args"]
    # KubeRay calls the service of a head so.
    assert f"--address http://{name}-head-svc:8265 " in script
    checked = subprocess.run(["bash", "-n", "-c", script], capture_output=True, check=False)
    assert checked.returncode == 0, checked.stderr


def test_an_image_is_built_by_the_targets_of_the_makefile() -> None:
    text = (ROOT / "deploy" / "Dockerfile").read_text()
    (target,) = re.findall(r"make ACCEL=\$ACCEL (\S+)", text)
    assert (
        target.replace("$ACCEL", "$(ACCEL)").replace(".venv", "$(VENV)")
        in (ROOT / "Makefile").read_text()
    )
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert ignored == (ROOT / ".rayignore").read_text().split()


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What make looks at, without an environment."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    return tmp_path


def make(clone: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make without what the make that runs these tests has set."""
    environment = {k: v for k, v in os.environ.items() if k not in ("ACCEL", "MAKEFLAGS")}
    return subprocess.run(
        ["make", *arguments],
        cwd=clone,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def planned(clone: Path, *arguments: str) -> str:
    """The commands that make would run."""
    done = make(clone, "--dry-run", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def install(clone: Path, accelerator: str) -> None:
    (clone / ".venv").mkdir()
    for stamp in (accelerator, "dev"):
        (clone / ".venv" / f".installed-{stamp}").touch()


def test_demo_on_a_gpu_machine_trains_on_the_gpu(clone: Path) -> None:
    commands = planned(clone, "ACCEL=gpu", "demo")

    assert "requirements/gpu.txt" in commands
    (run,) = [line for line in commands.splitlines() if "braid run" in line]
    assert "--set cluster.use_gpu=true --set cluster.num_workers=1" in run
    assert "use_gpu" not in planned(clone, "demo")


@pytest.mark.parametrize("accelerator", ["cpu", "gpu"])
def test_tests_run_in_the_environment_that_is_there(clone: Path, accelerator: str) -> None:
    install(clone, accelerator)

    assert "pip" not in planned(clone, "test")
    assert ("use_gpu=true" in planned(clone, "demo")) == (accelerator == "gpu")


def test_gpu_tests_install_what_they_need_and_run_on_gpus_only(clone: Path) -> None:
    commands = planned(clone, "ACCEL=gpu", "test-gpu")
    assert commands.index("requirements/gpu.txt") < commands.index("requirements/dev.txt")
    assert commands.index("requirements/dev.txt") < commands.index("pytest -m gpu tests/gpu")

    install(clone, "cpu")
    done = make(clone, "test-gpu")
    assert done.returncode == 2
    assert "run make ACCEL=gpu test-gpu" in done.stderr


@pytest.mark.parametrize("version", ["(3, 10, 14)", "(3, 13, 0)"])
def test_a_python_that_does_not_fit_is_refused_before_anything_is_installed(
    clone: Path, version: str
) -> None:
    python = clone / "other_python"
    python.write_text(
        f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = {version}; $2"\n'
    )
    python.chmod(0o755)

    done = make(clone, f"PYTHON={python}", "demo")

    assert done.returncode == 2
    assert f"needs Python 3.11 or 3.12, and {python} is none" in done.stderr
    assert not (clone / ".venv").exists()


def test_another_accelerator_means_a_fresh_environment(clone: Path) -> None:
    install(clone, "gpu")

    assert "requirements/cpu.txt" in planned(clone, "ACCEL=cpu", "test")
    assert "requirements/cpu.txt" not in planned(clone, "test")


def test_the_nightly_script_is_bash_and_its_crontab_entry_one_plain_line() -> None:
    """Cron continues no line, sets no variable, and takes % for a line break."""
    blocks = re.findall(r"```\n(.*?)```", (ROOT / "docs" / "ray-jobs.md").read_text(), re.DOTALL)
    (script,) = [block for block in blocks if block.startswith("#!/bin/bash")]
    (entry,) = [block for block in blocks if re.match(r"\d+ \d+ \* \* \*", block)]

    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert len(entry.splitlines()) == 1
    assert not set("\\$%") & set(entry)
    for name in ("PATH", "RAY_AUTH_MODE", "BRAID"):
        assert f"{name}=" in script


@pytest.mark.parametrize(
    ("of_run", "of_prune", "code"), [(0, 0, 0), (1, 0, 1), (0, 2, 1), (3, 2, 3)]
)
def test_nightly_scripts_prune_whatever_became_of_the_run_and_end_with_its_code(
    tmp_path: Path, of_run: int, of_prune: int, code: int
) -> None:
    blocks = re.findall(r"```\n(.*?)```", (ROOT / "docs" / "ray-jobs.md").read_text(), re.DOTALL)
    (guide,) = [block for block in blocks if block.startswith("#!/bin/bash")]
    job = documents("nightly.yaml")["CronJob"]["spec"]["jobTemplate"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    stub = f'case "$*" in *prune*) echo pruned; exit {of_prune};; *) exit {of_run};; esac'
    for name in ("ray", "braid"):
        (tmp_path / name).write_text(f"#!/bin/bash\n{stub}\n")
        (tmp_path / name).chmod(0o755)
    for script in (guide, *container["args"]):
        with_stubs = script.replace("PATH=$BRAID/.venv/bin:$PATH", f"PATH={tmp_path}:$PATH")
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        ended = subprocess.run(
            ["bash", "-c", with_stubs], capture_output=True, text=True, env=environment, check=False
        )
        assert (ended.returncode, ended.stdout) == (code, "pruned\n"), ended.stderr
