"""cluster.yaml and the manifests of deploy/: what Ray and Kubernetes would accept, and what must never stand in them."""

import copy
import os
import re
import shlex
import subprocess
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import DeploymentSchema, ServeApplicationSchema, ServeDeploySchema

from serving.application import StandingArgs

ROOT = Path(__file__).parents[1]
CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text())
MANIFESTS = sorted((ROOT / "deploy").glob("*.yaml"))
SCRIPTS = sorted((ROOT / "deploy").glob("*.sh"))


def pods(manifest: dict) -> list[dict]:
    """The pod templates of a manifest."""
    spec = manifest["spec"].get("rayClusterConfig", manifest["spec"])
    groups = [spec.get("headGroupSpec"), *spec.get("workerGroupSpecs", [])]
    return [group["template"]["spec"] for group in groups if group]


def commands() -> list[str]:
    return [command for key, value in CLUSTER.items() if key.endswith("_commands") for command in value]


def test_ray_accepts_the_cluster_and_changes_none_of_its_commands():
    prepared = prepare_config(copy.deepcopy(CLUSTER))
    validate_config(prepared)
    for role in ("head", "worker"):
        # Ray makes one list for each kind of node.
        assert prepared[f"{role}_setup_commands"] == CLUSTER["setup_commands"] + CLUSTER[f"{role}_setup_commands"]
        assert prepared[f"{role}_start_ray_commands"] == CLUSTER[f"{role}_start_ray_commands"]
    assert prepared["initialization_commands"] == []


def test_every_default_of_rays_that_is_unsafe_or_moves_is_replaced():
    text = " ".join(commands())
    for unwanted in ("0.0.0.0", "wheels", "pip install", "anaconda", "--force"):
        assert unwanted not in text, unwanted
    assert CLUSTER["provider"]["use_internal_ips"] is True
    for name, kind in CLUSTER["available_node_types"].items():
        node = kind["node_config"]
        assert re.fullmatch(r"[a-z0-9]+\.[a-z0-9]+", node["InstanceType"]), name
        assert node["ImageId"].startswith("resolve:ssm:/aws/service/"), name
        assert node["IamInstanceProfile"], f"{name}: Ray gives its own profile to the head alone"
        assert "InstanceMarketOptions" not in node, f"{name} is no spot instance unless its owner wants one"
        assert node["MetadataOptions"] == {"HttpTokens": "required"}, name
        assert node["SubnetIds"], f"{name}: Ray would take any subnet of the VPC, public ones too"
        assert kind["labels"]["role"] == name
    assert CLUSTER["available_node_types"]["head"]["resources"] == {"CPU": 0}


def test_a_head_listens_to_this_machine_alone_and_runs_no_tasks():
    [start] = [command for command in CLUSTER["head_start_ray_commands"] if "--head" in command]
    assert "--dashboard-host=127.0.0.1" in start
    assert "--num-cpus=0" in start
    assert not any("dashboard-host" in command for command in CLUSTER["worker_start_ray_commands"])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_one_that_bash_understands(script):
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0


@pytest.mark.parametrize("missing", ["auth_token", "prefloop.env"])
def test_a_node_without_its_token_or_its_secrets_is_not_started(tmp_path, missing):
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("" if missing == "auth_token" else "secret")
    (tmp_path / ".prefloop.env").write_text("" if missing == "prefloop.env" else "PREFLOOP_HOME=/tmp/x\n")
    script = ROOT / "deploy" / "start-node.sh"
    told = subprocess.run(
        ["bash", str(script), "--head"], env={**os.environ, "HOME": str(tmp_path)}, capture_output=True, text=True
    )
    assert told.returncode == 1
    assert re.search(rf"start-node: .*{re.escape(missing)} is missing or empty", told.stderr)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_manifest_is_of_the_version_that_is_locked_and_lets_nobody_in(path):
    manifest = yaml.safe_load(path.read_text())
    assert manifest["apiVersion"] == "ray.io/v1"
    spec = manifest["spec"].get("rayClusterConfig", manifest["spec"])
    if manifest["kind"] != "RayJob":
        assert spec["rayVersion"] == version("ray")
        assert spec["authOptions"] == {"mode": "token"}
    assert "LoadBalancer" not in str(manifest)
    for pod in pods(manifest):
        [container] = pod["containers"]
        assert container["image"] == f"REGISTRY/prefloop:{version('prefloop')}"
        security = container["securityContext"]
        assert (security["runAsNonRoot"], security["allowPrivilegeEscalation"]) == (True, False)
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert container["envFrom"] == [{"secretRef": {"name": "prefloop-env"}}]
        assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]


def test_the_job_of_a_manifest_is_one_command_that_runs_on_the_cluster():
    [path] = [path for path in MANIFESTS if path.name == "rayjob.yaml"]
    entrypoint = yaml.safe_load(path.read_text())["spec"]["entrypoint"]
    assert not set("&|;<>$`\n") & set(entrypoint), "KubeRay's submitter would run the rest"
    command = shlex.split(entrypoint)
    at = command.index("loop")
    assert command[at - 3 : at] == ["python", "-m", "ray_jobs"]
    # The same program as here takes such options, and the folder is the image's.
    assert (command[0], command[1]) == ("env", "--chdir=prefloop")
    assert "WORKDIR /home/ray/prefloop" in (ROOT / "deploy" / "Containerfile").read_text()


@pytest.mark.parametrize("ignored", [".rayignore", ".gitignore"])
def test_files_with_secrets_are_neither_kept_nor_sent_with_a_job(ignored):
    assert "*.env" in (ROOT / ignored).read_text().splitlines()


def test_the_copy_of_the_checkout_leaves_out_secrets_and_no_mount_is_left_out():
    left_out = CLUSTER["rsync_exclude"]
    assert {"prefloop.env", ".env"} <= set(left_out)
    for source in CLUSTER["file_mounts"].values():
        # rsync holds its patterns against a file that is named by itself, too.
        assert not any(fnmatch(Path(source).name, pattern) for pattern in left_out), source


def test_the_manifest_of_the_service_is_one_that_serve_and_the_application_take():
    [path] = [path for path in MANIFESTS if path.name == "rayservice.yaml"]
    tree = yaml.safe_load(yaml.safe_load(path.read_text())["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(tree)
    [application] = tree["applications"]
    # Serve's schema takes unknown keys without a word.
    assert application.keys() <= ServeApplicationSchema.model_fields.keys()
    for deployment in application.get("deployments", []):
        assert deployment.keys() <= DeploymentSchema.model_fields.keys()
    module, _, function = application["import_path"].partition(":")
    assert (module, function) == ("serving.application", "standing")
    assert StandingArgs(**application["args"]).serving.replicas >= 2


def test_the_example_of_the_environment_names_what_the_product_reads():
    names = re.findall(r"^(\w+)=", (ROOT / "deploy" / "prefloop.env.example").read_text(), re.MULTILINE)
    assert {"PREFLOOP_HOME", "PREFLOOP_LEDGER", "PREFLOOP_SIGNING_KEY", "PREFLOOP_API_KEY"} <= set(names)
    source = (ROOT / "app" / "storage.py").read_text()
    assert [name for name in names if name.startswith("PREFLOOP_") and name not in source] == []
