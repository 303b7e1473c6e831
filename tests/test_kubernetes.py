"""Jobs of Kubernetes: the manifests against its own schemas, against the MPIJob's, and against strange words."""

import subprocess
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

VERSION = "1.30"
"""Of Kubernetes; the latest that the schemas are known of is tried too."""

TEMPLATE = {"type": "object"}
"""A pod's template, which is checked as the pod that it makes."""
REPLICAS = {"type": "object", "additionalProperties": False, "properties": {
    "replicas": {"type": "integer", "minimum": 1}, "template": TEMPLATE,
    "restartPolicy": {"enum": ["Always", "OnFailure", "Never", "ExitCode"]}}}
MPI_JOB = {"type": "object", "additionalProperties": False, "required": ["apiVersion", "kind", "metadata", "spec"],
           "properties": {
    "apiVersion": {"const": "kubeflow.org/v2beta1"}, "kind": {"const": "MPIJob"}, "metadata": {"type": "object"},
    "spec": {"type": "object", "additionalProperties": False, "required": ["mpiReplicaSpecs"], "properties": {
        "slotsPerWorker": {"type": "integer", "minimum": 1}, "sshAuthMountPath": {"type": "string"},
        "mpiImplementation": {"enum": ["OpenMPI", "Intel", "MPICH"]}, "runLauncherAsWorker": {"type": "boolean"},
        "launcherCreationPolicy": {"enum": ["AtStartup", "WaitForWorkersReady"]},
        "runPolicy": {"type": "object", "additionalProperties": False, "properties": {
            "cleanPodPolicy": {"enum": ["None", "Running", "All"]}, "suspend": {"type": "boolean"},
            "ttlSecondsAfterFinished": {"type": "integer"}, "activeDeadlineSeconds": {"type": "integer"},
            "backoffLimit": {"type": "integer"}, "managedBy": {"type": "string"},
            "schedulingPolicy": {"type": "object"}}},
        "mpiReplicaSpecs": {"type": "object", "additionalProperties": False, "required": ["Launcher", "Worker"],
                            "properties": {"Launcher": REPLICAS, "Worker": REPLICAS}}}}}}
"""The fields of MPIJob v2beta1, as the operator's resource definition has them; unknown ones would be dropped there."""


def documents(hpcai, *words: object) -> list[dict]:
    done = hpcai("launch", "kubernetes", "--image", "hpcai:1", *words)
    assert done.exit_code == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def check(found: list[dict]) -> None:
    """Check the documents, and the pods that the operator makes of the job."""
    job = found[-1]
    jsonschema.validate(job, MPI_JOB)
    pods = [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": specs["template"]["spec"]}
            for specs in job["spec"]["mpiReplicaSpecs"].values()]
    for document in [*found[:-1], *pods]:
        for version in (VERSION, kubernetes_validate.latest_version()):
            kubernetes_validate.validate(document, version, strict=True)


def script_of(found: list[dict]) -> str:
    return next(document for document in found if document["kind"] == "ConfigMap")["data"]["job.sh"]


@pytest.mark.parametrize("words", [
    ["--", "train", "mnist"],
    ["--workers", 4, "--slots-per-worker", 2, "--cpus", "8", "--memory", "32Gi", "--gpus", 2, "--limit-seconds", 3600,
     "--restarts", 0, "--namespace", "team", "--storage", "1Ti", "--storage-class", "fast", "--", "train", "mnist"],
    ["--claim", "datasets", "--name", "first", "--", "compress", "runs/mnist-1", "--quantize", "int8"]],
    ids=["least", "most", "compress"])
def test_kubernetes_and_the_operator_take_it(hpcai, words):
    found = documents(hpcai, *words)
    check(found)
    assert ("PersistentVolumeClaim" in [document["kind"] for document in found]) is ("--claim" not in words)


def test_what_was_asked_for_is_in_it(hpcai):
    found = documents(hpcai, "--workers", 3, "--slots-per-worker", 2, "--gpus", 2, "--claim", "datasets", "--",
                      "train", "mnist", "--epochs", 20)
    job = found[-1]["spec"]
    assert job["slotsPerWorker"] == 2 and job["mpiReplicaSpecs"]["Worker"]["replicas"] == 3
    launcher, worker = (job["mpiReplicaSpecs"][role]["template"]["spec"] for role in ("Launcher", "Worker"))
    assert worker["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": "2"}
    assert "resources" not in launcher["containers"][0]
    assert launcher["volumes"][0]["persistentVolumeClaim"]["claimName"] == "datasets"
    script = script_of(found)
    assert '--np "${SLURM_NTASKS:-6}"' in script and "command=(hpcai train mnist --epochs 20)" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""


@pytest.mark.parametrize("content", ['"""Plain."""\n\nx = 1\n', "\ttabs\n\n\n", "no end", "  indented\n", "\x07bell\n",
                                     "é猫\n", "# a: b\n- c\n---\n", "trailing  \n"])
def test_a_recipe_of_ones_own_travels_as_it_is(hpcai, content):
    Path("mine.py").write_text(content)
    found = documents(hpcai, "--", "train", "./mine.py", "--data", "mine.h5")
    check(found)
    texts = next(document for document in found if document["kind"] == "ConfigMap")["data"]
    assert texts["mine.py"] == content and "train /etc/hpcai/mine.py" in texts["job.sh"]


@pytest.mark.parametrize("words", [["train", "mnist", "--set", "note=é: \"'\n$(id)"], ["train", "Mnist_V2.x" * 9]])
def test_strange_words_stay_words(hpcai, words):
    found = documents(hpcai, "--", *words)
    check(found)
    line = script_of(found)
    shown = subprocess.run(["bash", "-c", line[line.index("command=("):line.index("run=runs/")]
                            + 'printf "%s\\0" "${command[@]}"'], capture_output=True, text=True)
    assert shown.stdout.split("\0")[:-1] == ["hpcai", *words]


@pytest.mark.parametrize(("words", "code", "message"), [
    (["--name", "Not lower", "--", "train", "mnist"], 2, "no name for a job"),
    (["--memory", "much", "--", "train", "mnist"], 2, "no such memory"),
    (["--namespace", "a\nb", "--", "train", "mnist"], 2, "no such namespace"),
    (["--claim", "{}", "--", "train", "mnist"], 2, "no such claim"),
    (["--", "train", "./none.py"], 3, "cannot read the recipe's file"),
    (["--workers", 2, "--", "predict", "run", "x.png"], 2, "runs in one process")])
def test_what_kubernetes_would_not_take(hpcai, words, code, message):
    done = hpcai("launch", "kubernetes", "--image", "hpcai:1", *words)
    assert done.exit_code == code and message in done.stderr and done.stdout == ""


def test_an_image_is_needed_and_a_site_may_name_it(hpcai, monkeypatch):
    done = hpcai("launch", "kubernetes", "--", "train", "mnist")
    assert done.exit_code == 2 and "give --image" in done.stderr
    Path("site.toml").write_text('[kubernetes]\nimage = "registry.example/hpcai:2"\nworkers = 2\n')
    monkeypatch.setenv("HPCAI_SITE", "site.toml")
    done = hpcai("launch", "kubernetes", "--output", "job.yaml", "--", "train", "mnist")
    assert done.exit_code == 0 and "kubectl apply -f job.yaml" in done.stdout
    job = list(yaml.safe_load_all(Path("job.yaml").read_text()))[-1]
    worker = job["spec"]["mpiReplicaSpecs"]["Worker"]
    assert worker["replicas"] == 2
    assert worker["template"]["spec"]["containers"][0]["image"] == "registry.example/hpcai:2"
