"""A command of hpcai as a job of Kubernetes: an MPIJob of the Kubeflow MPI operator (v2beta1), with what it needs.

The operator starts workers that wait with an ssh server, and a launcher that knows their names; there the same script
runs as in a job of Slurm, and `hpcai ... --np` starts the ranks on the workers.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from hpcai_cli import job_script
from hpcai_cli.errors import DataError, UsageError
from hpcai_cli.job_script import Command

WORK, TEXTS = Path("/work"), Path("/etc/hpcai")
"""Where the volume and the texts are mounted."""

_NAME = re.compile(r"[a-z]([-a-z0-9]{0,40}[a-z0-9])?")
_QUANTITY = re.compile(r"[1-9]\d{0,11}(m|[KMGT]i?|k)?", re.ASCII)
_IMAGE = re.compile(r"[\w][\w./:@-]{0,254}", re.ASCII)
_MOST_TEXT = 900_000
"""Bytes of a ConfigMap, which takes a mebibyte."""


@dataclass(frozen=True)
class Resources:
    """What a job asks the cluster for; what is 0 or empty is left to it."""

    image: str = ""
    """With hpcai, Horovod built with Open MPI, and an ssh server."""
    namespace: str = ""
    workers: int = 1
    """Pods that train."""
    slots_per_worker: int = 1
    """Ranks of each."""
    cpus: str = ""
    """Of each worker, as Kubernetes writes it: 8 or 500m."""
    memory: str = ""
    """Of each worker: 32Gi."""
    gpus: int = 0
    """Of each worker."""
    claim: str = ""
    """A volume claim that is there and can be mounted by all pods at once; a new one of `storage` when empty."""
    storage: str = "100Gi"
    storage_class: str = ""
    limit_seconds: int = 0
    """After which Kubernetes ends the job."""
    restarts: int = 3
    """How often a job that failed or was evicted is started again; it goes on where it was."""

    def check(self) -> None:
        """Raise a UsageError for what Kubernetes would not take."""
        if not self.image:
            raise UsageError("a job of Kubernetes runs in an image", expected="one with hpcai, Horovod and sshd",
                             mend="give --image, or write it into the site's defaults", received="none")
        lower, quantity = (_NAME, "a name in lower case"), (_QUANTITY, "a quantity such as 8, 500m or 32Gi")
        for name, (pattern, expected) in {"image": (_IMAGE, "a name such as registry.example/hpcai:1"),
                                          "namespace": lower, "claim": lower, "storage_class": lower,
                                          "cpus": quantity, "memory": quantity, "storage": quantity}.items():
            value = getattr(self, name)
            if value and not pattern.fullmatch(value):
                raise UsageError(f"Kubernetes takes no such {name.replace('_', ' ')}", expected=expected,
                                 received=value)

    @property
    def tasks(self) -> int:
        """Ranks of the job."""
        return self.workers * self.slots_per_worker


def name_of(command: Command) -> str:
    """Return a name for the job that Kubernetes takes: lower-case letters, digits and hyphens, beginning with a letter.

    It is short enough for the names of pods that the operator makes of it.
    """
    return re.sub(r"[^a-z0-9]+", "-", f"hpcai-{command.name}".lower())[:40].strip("-")


def manifest(command: Command, wanted: Resources, name: str) -> str:
    """Return the documents in YAML: the claim where there is none, the texts, the job.

    Raises:
        DataError: the recipe's file cannot be read, or is too large.
        UsageError: the name cannot be the job's.
    """
    if not _NAME.fullmatch(name):
        raise UsageError("no name for a job of Kubernetes", received=name,
                         expected="at most 42 lower-case letters, digits and hyphens")
    recipe, words = _recipe(command)
    script = job_script.text(Command(words, command.tasks, command.launcher), WORK / "jobs" / name, here=WORK,
                             hpcai="hpcai", before=['mkdir -p "$folder"'])
    texts = {"job.sh": script, **recipe}
    documents = [] if wanted.claim else [_claim(name, wanted)]
    return "---\n".join([*documents, _texts(name, wanted, texts), _job(name, wanted)])


def _recipe(command: Command) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the file of a user's recipe by its name, and the words with its place in the pods."""
    place = next((number for number, word in enumerate(command.words) if number and word.endswith(".py")), None)
    if place is None:
        return {}, command.words
    path = Path(command.words[place])
    try:
        content = path.read_text()
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the recipe's file: {getattr(error, 'strerror', None) or error}",
                        received=str(path)) from None
    if len(content.encode()) > _MOST_TEXT:
        raise DataError("the recipe's file is too large for a ConfigMap", expected=f"at most {_MOST_TEXT:,} bytes",
                        mend="put it on the volume", received=str(path))
    if not re.fullmatch(r"[-\w.]+", path.name, re.ASCII):
        raise UsageError("the recipe's file has a name that no ConfigMap takes", received=path.name,
                         expected="letters, digits, -, _ and .")
    return {path.name: content}, (*command.words[:place], str(TEXTS / path.name), *command.words[place + 1:])


# ---- Documents -----------------------------------------------------------------------------------------------------
# JSON's strings and numbers are YAML's too, so that values need no quoting of their own.

def _metadata(name: str, wanted: Resources) -> str:
    space = f"\n  namespace: {json.dumps(wanted.namespace)}" if wanted.namespace else ""
    return f"metadata:\n  name: {name}{space}\n  labels:\n    app.kubernetes.io/name: {name}\n"


def _claim(name: str, wanted: Resources) -> str:
    kind = f"  storageClassName: {json.dumps(wanted.storage_class)}\n" if wanted.storage_class else ""
    return ("apiVersion: v1\nkind: PersistentVolumeClaim\n" + _metadata(name, wanted)
            + "spec:\n  # All pods mount it at once.\n  accessModes: [ReadWriteMany]\n" + kind
            + f"  resources:\n    requests:\n      storage: {json.dumps(wanted.storage)}\n")


def _texts(name: str, wanted: Resources, texts: dict[str, str]) -> str:
    data = ""
    for key, content in texts.items():
        # A block keeps a script readable; what a block cannot hold is written as one string.
        plain = content.endswith("\n") and not content.startswith((" ", "\n")) and all(
            sign == "\n" or sign.isprintable() for sign in content)
        block = "|\n" + "".join(f"    {line}".rstrip(" ") + "\n" if not line else f"    {line}\n"
                                for line in content[:-1].split("\n"))
        data += f"  {json.dumps(key)}: {block if plain else json.dumps(content) + chr(10)}"
    return "apiVersion: v1\nkind: ConfigMap\n" + _metadata(name, wanted) + "data:\n" + data


def _job(name: str, wanted: Resources) -> str:
    limit = f"    activeDeadlineSeconds: {wanted.limit_seconds}\n" if wanted.limit_seconds else ""
    return ("apiVersion: kubeflow.org/v2beta1\nkind: MPIJob\n" + _metadata(name, wanted)
            + f"spec:\n  slotsPerWorker: {wanted.slots_per_worker}\n  mpiImplementation: OpenMPI\n"
            f"  runPolicy:\n    cleanPodPolicy: Running\n    backoffLimit: {wanted.restarts}\n{limit}"
            "  mpiReplicaSpecs:\n"
            + _replicas("Launcher", 1, name, wanted, f'            command: [bash, {TEXTS / "job.sh"}]\n')
            + _replicas("Worker", wanted.workers, name, wanted, _limits(wanted)))


def _replicas(role: str, count: int, name: str, wanted: Resources, lines: str) -> str:
    claim = wanted.claim or name
    return f"""\
    {role}:
      replicas: {count}
      restartPolicy: {"OnFailure" if role == "Launcher" else "Never"}
      template:
        spec:
          # Time for a checkpoint when the pod is evicted.
          terminationGracePeriodSeconds: 120
          containers:
          - name: {role.lower()}
            image: {json.dumps(wanted.image)}
            workingDir: {WORK}
{lines}\
            volumeMounts:
            - {{name: work, mountPath: {WORK}}}
            - {{name: texts, mountPath: {TEXTS}}}
          volumes:
          - name: work
            persistentVolumeClaim: {{claimName: {json.dumps(claim)}}}
          - name: texts
            configMap: {{name: {name}}}
"""


def _limits(wanted: Resources) -> str:
    found = {"cpu": wanted.cpus, "memory": wanted.memory, "nvidia.com/gpu": str(wanted.gpus or "")}
    lines = "".join(f"                {key}: {json.dumps(value)}\n" for key, value in found.items() if value)
    return f"            resources:\n              limits:\n{lines}" if lines else ""
